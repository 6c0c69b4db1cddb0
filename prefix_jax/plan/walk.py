"""Walks a compiled program as it runs: every instruction, and how often."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator

from prefix_jax.plan.hlo import Computation, Instruction, Module

# Operations of one run of an instruction itself.
Cost = Callable[[Computation, Instruction], int]


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction where the program comes by it.

    Attributes:
        computation: that it stands in.
        instruction: itself.
        kernel: the instruction that starts it: itself, or the outermost fusion around it.
        run: a number for every run of a computation outside of fusions: a loop's body, say.
        count: how often.
        unknown: a loop around it of which the text does not tell how often it runs: it counts
            once.
    """

    computation: Computation
    instruction: Instruction
    kernel: Instruction
    run: int
    count: int
    unknown: str | None

    @property
    def fused(self) -> bool:
        """Whether it is a part of a kernel."""
        return self.kernel is not self.instruction

    @property
    def times(self) -> int:
        """How often.

        Raises:
            ValueError: the text does not tell.
        """
        if self.unknown is not None:
            raise ValueError(f"the text does not tell how often the loop {self.unknown} runs")
        return self.count


def visits(module: Module, cost: Cost) -> Iterator[Visit]:
    """Every instruction of the program, with those of fusions, calls and loops.

    Of a conditional, those of the branch that costs most.
    """
    runs = itertools.count()

    def inside(
        name: str, count: int, unknown: str | None, kernel: Instruction | None, run: int
    ) -> Iterator[Visit]:
        computation = module.computations[name]
        for instruction in computation.values():
            yield Visit(computation, instruction, kernel or instruction, run, count, unknown)
            opcode = instruction.opcode
            if opcode == "while":
                # The condition runs once more than the body, and costs nothing worth a thought.
                trips = _trips(module, computation, instruction)
                times, which = (1, instruction.name) if trips is None else (trips, unknown)
                body = _called(instruction, "body")
                yield from inside(body, count * times, which, kernel, next(runs))
            elif opcode == "conditional":
                names = instruction.listed("branch_computations") or (
                    _called(instruction, "true_computation"),
                    _called(instruction, "false_computation"),
                )
                branches = [list(inside(n, count, unknown, kernel, next(runs))) for n in names]
                yield from max(branches, key=total)
            elif opcode in ("fusion", "async-start"):
                called = _called(instruction, "calls")
                yield from inside(called, count, unknown, kernel or instruction, run)
            elif opcode == "call":
                called = _called(instruction, "to_apply")
                yield from inside(called, count, unknown, kernel, next(runs))

    def total(branch: list[Visit]) -> int:
        return sum(visit.count * cost(visit.computation, visit.instruction) for visit in branch)

    return inside(module.entry, 1, None, None, next(runs))


def _called(instruction: Instruction, key: str) -> str:
    name = instruction.word(key)
    if name is None:
        raise ValueError(f"the {instruction.opcode} {instruction.name} names no {key}")
    return name


def _trips(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a loop runs; None if the text does not tell.

    CPU and GPU programs say so. TPU programs do not, but a scan is known by its looks: it counts
    from a constant to another, in equal steps. (Products that gather their weights piece by piece
    take two at a time, one from either side.)
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])

    def producer(computation: Computation, name: str) -> Instruction:
        while computation[name].opcode in ("copy", "bitcast"):
            (name,) = computation[name].operands
        return computation[name]

    def constant(computation: Computation, name: str) -> int | None:
        made = producer(computation, name)
        return int(made.operands[0]) if made.opcode == "constant" else None

    condition = module.computations[_called(loop, "condition")]
    body = module.computations[_called(loop, "body")]
    test, result = (
        next(instruction for instruction in inside.values() if instruction.root)
        for inside in (condition, body)
    )
    start = producer(computation, loop.operands[0])
    if test.opcode == "compare" and test.word("direction") == "LT" and start.opcode == "tuple":
        counter = producer(condition, test.operands[0])
        limit = constant(condition, test.operands[1])
        if counter.opcode == "get-tuple-element" and limit is not None:
            index = int(counter.word("index") or 0)
            first = constant(computation, start.operands[index])
            next_one = producer(body, result.operands[index])
            steps = [constant(body, operand) for operand in next_one.operands]
            step = next((step for step in steps if step is not None), None)
            if next_one.opcode == "add" and first is not None and step:
                return max(math.ceil((limit - first) / step), 0)
    return None
