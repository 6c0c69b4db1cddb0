"""What devices send each other in a compiled program."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from prefix_jax.plan.hlo import Instruction
from prefix_jax.plan.walk import Visit

Kind = Literal["all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"]
KINDS: tuple[Kind, ...] = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_BETWEEN_SLICES: dict[str, Kind] = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
        kind: what it is.
        op_name: where in the traced Python program it comes from.
        nbytes: of one device's array where it is whole: what is gathered, reduced or scattered.
        groups: numbers of the devices that exchange with each other, [groups, size]; of slices,
            if it is between these.
        hidden: whether other work goes on meanwhile.
        count: how many times the program does it.
        opposed: whether one like it goes the other way round at the same time, over the other
            direction of the same links.
        written: bytes of its result that reach the device's memory inside of fusions, where `moved`
            does not count them.
        between_slices: whether it goes over the network of the data centre, from each device to its
            like in other slices.
    """

    kind: Kind
    op_name: str
    nbytes: int
    groups: np.ndarray
    hidden: bool
    count: int
    opposed: bool = False
    written: int = 0
    between_slices: bool = False

    @property
    def sent(self) -> float:
        """Bytes that each device sends in one of them, over the best of algorithms."""
        n = self.groups.shape[1]
        if self.kind == "collective-permute":
            return self.nbytes
        return self.nbytes * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


def collectives(found: Sequence[Visit]) -> list[Collective]:
    """Every exchange of a walk.

    The TPU compiler spreads an asynchronous one over several fusions, some of them in loops that
    run meanwhile. Each names it, and one of them starts it.
    """
    starting = {
        (visit.run, visit.kernel.name)
        for visit in found
        if visit.instruction.word("custom_call_target") == "AsyncCollectiveStart"
    }
    started = {
        visit.instruction.word("channel_id")
        for visit in found
        if (visit.run, visit.kernel.name) in starting
    }
    pairs = {(visit.run, _pairs(visit.instruction)) for visit in found}
    made, seen = [], set()
    for visit in found:
        instruction = visit.instruction
        if instruction.opcode == "send":
            made.append(_between_slices(visit))
            continue
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        channel = instruction.word("channel_id")
        key = (visit.run, channel)
        elsewhere = channel in started and (visit.run, visit.kernel.name) not in starting
        if channel is not None and (elsewhere or key in seen):
            continue
        seen.add(key)
        groups = _groups(instruction)
        if groups.shape[1] < 2:
            continue
        made.append(
            Collective(
                kind,
                instruction.op_name,
                _whole(visit, kind, groups.shape[1]),
                groups,
                visit.fused or instruction.opcode.endswith("-start"),
                visit.count,
                (visit.run, tuple(sorted(pair[::-1] for pair in _pairs(instruction)))) in pairs
                and len(groups) > 2,
                visit.fused * sum(a.nbytes for a in instruction.results if a.space == 0),
            )
        )
    return made


def _between_slices(visit: Visit) -> Collective:
    """An exchange between slices, which a program makes by sending to its host and receiving from
    it, while other work goes on."""
    instruction = visit.instruction
    kind = _BETWEEN_SLICES.get(instruction.word("_xla_megascale_transfer_type") or "")
    if kind is None:
        raise ValueError(
            f"what {instruction.name} sends is not understood: {instruction.attributes:.300}"
        )
    slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}x', instruction.attributes)
    groups = np.array([_numbers(slices[1]) if slices else (1, 2)])
    array = visit.computation[instruction.operands[0]].results[0]
    whole = array.nbytes * (groups.shape[1] if kind == "all-gather" else 1)
    return Collective(
        kind, instruction.op_name, whole, groups, True, visit.count, between_slices=True
    )


def _whole(visit: Visit, kind: Kind, size: int) -> int:
    """Bytes of the array that is gathered, reduced, scattered or sent."""
    operands = [
        array for name in visit.instruction.operands for array in visit.computation[name].results
    ]
    given = sum(array.nbytes for array in operands)
    return given * size if kind == "all-gather" else given


def _pairs(instruction: Instruction) -> tuple[tuple[int, int], ...]:
    """Who sends to whom, of a permutation, those that send to themselves left out."""
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes)
    pairs = re.findall(r"(\d+),(\d+)", found[1]) if found else ()
    return tuple(sorted((int(a), int(b)) for a, b in pairs if a != b))


def _groups(instruction: Instruction) -> np.ndarray:
    """Devices by group, [groups, size]."""
    text = instruction.attributes
    if "source_target_pairs=" in text:
        return np.array(_pairs(instruction) or [[0]])
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", text):
        return np.array(
            [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        )
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+?)(?:,\s|$)", text):
        return _iota(iota[2]).reshape(_numbers(iota[1]))
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", text
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(sizes.values()))
        names = re.findall(r"'(\w+)'", mesh[3])
        if mesh[3].replace(" ", "") == ",".join(f"'{name}'" for name in names):
            axes = [list(sizes).index(name) for name in names]
            rest = [axis for axis in range(len(sizes)) if axis not in axes]
            size = math.prod(sizes[name] for name in names)
            return ids.reshape(tuple(sizes.values())).transpose(*rest, *axes).reshape(-1, size)
    raise ValueError(f"the devices of {instruction.name} are not understood: {text:.200}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _iota(text: str) -> np.ndarray:
    """So many numbers, reshaped and transposed: of "[2,4]T(1,0)"."""
    found: Any = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    dims = _numbers(found[1])
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return numbers.transpose(_numbers(found[2])) if found[2] else numbers
