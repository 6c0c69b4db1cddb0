"""Memory traffic of a compiled program."""

from __future__ import annotations

from prefix_jax.plan.hlo import PASSING, Array, Computation, Instruction, Module
from prefix_jax.plan.walk import Visit

# Instructions that move nothing, or are counted at their start.
_FREE = PASSING | {"partition-id", "replica-id", "after-all"}
# Custom calls of the TPU compiler that name memory and move nothing.
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}
_PARTS = ("dynamic-slice", "slice", "gather")
# A fusion within a fusion that changes the tiling of its operand, computed only where it is used.
_IN_PLACE = "output_to_operand_aliasing={{}: (0, {})}"


def bytes_accessed(module: Module, visit: Visit) -> int:
    """Bytes that one run of a kernel reads from and writes to memory; 0 inside a fusion.

    Arrays in on-chip memory are free. If a kernel only slices an operand, only the slices count; if
    it only updates a result in place, only the update counts. Layout padding and collectives inside
    fusions are not counted.
    """
    instruction = visit.instruction
    if visit.fused or instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0
    if instruction.word("custom_call_target") in _FREE_CALLS:
        return 0
    operands = [visit.computation[name] for name in instruction.operands]
    arrays = [[a for a in operand.results if a.space == 0] for operand in operands]
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.word("calls") or ""]
        return _fusion(module, inside, instruction, arrays)
    if instruction.opcode in ("copy-start", "slice-start"):
        # Their result is (destination, source, …), or the other way round.
        ends = instruction.results[:2]
        return sum(array.space == 0 for array in ends) * min(array.nbytes for array in ends)
    if instruction.opcode in ("send", "recv"):
        # Transfers between slices: the result is the array and metadata of the transfer.
        return _size(instruction.results[:1])
    if instruction.opcode.endswith("-start"):
        return _size(instruction.results)
    if instruction.opcode in _PARTS:
        return 2 * _size(instruction.results)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _size(operands[1].results)
    return sum(map(_size, arrays)) + _size(instruction.results)


def _size(arrays: list[Array] | tuple[Array, ...]) -> int:
    return sum(array.nbytes for array in arrays if array.space == 0)


def _fusion(
    module: Module, inside: Computation, fusion: Instruction, arrays: list[list[Array]]
) -> int:
    total = 0
    for number, held in enumerate(arrays):
        if held:
            total += _read(module, inside, number, sum(array.nbytes for array in held))
    root = next(instruction for instruction in inside.values() if instruction.root)
    made = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for result, maker in zip(fusion.results, made, strict=False):
        if result.space == 0:
            total += _written(inside, maker, result)
    return total


def _read(module: Module, inside: Computation, number: int, whole: int) -> int:
    """Bytes that a fusion reads of an operand of `whole` bytes."""
    names = {
        name
        for name, instruction in inside.items()
        if instruction.opcode == "parameter" and instruction.operands[0] == str(number)
    }
    total = 0
    # Users come after their operands.
    for name, user in inside.items():
        used = [place for place, operand in enumerate(user.operands) if operand in names]
        if not used or user.opcode == "parameter":
            continue
        if user.opcode == "bitcast" or _IN_PLACE in user.attributes:
            names.add(name)
        elif user.opcode in _PARTS and used == [0]:
            total += sum(array.nbytes for array in user.results)
        elif _is_exchange(user):
            continue
        elif user.opcode == "fusion":
            called = module.computations[user.word("calls") or ""]
            total += sum(_read(module, called, place, whole) for place in used)
        elif user.opcode != "dynamic-update-slice" or used != [0]:
            return whole
    return min(total, whole)


def _is_exchange(instruction: Instruction) -> bool:
    """Whether an instruction is part of a collective, whose arrays a fusion only passes on."""
    target = instruction.word("custom_call_target") or ""
    exchanged = instruction.opcode.startswith(("all-", "reduce-scatter", "collective-"))
    return instruction.opcode == "tuple" or exchanged or target.startswith("AsyncCollective")


def _written(inside: Computation, maker: Instruction, result: Array) -> int:
    """Bytes that a fusion writes of a result."""
    while maker.opcode in ("bitcast", "get-tuple-element"):
        maker = inside[maker.operands[0]]
    if maker.opcode == "parameter" or _is_exchange(maker):
        return 0
    if maker.opcode == "dynamic-update-slice":
        return sum(array.nbytes for array in inside[maker.operands[1]].results)
    return result.nbytes
