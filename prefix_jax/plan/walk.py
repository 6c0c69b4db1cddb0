"""Walks a compiled program in execution order, with the number of runs of every instruction."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator

from prefix_jax.plan.hlo import Computation, Instruction, Module

# Operations of one run of an instruction.
Cost = Callable[[Computation, Instruction], int]


@dataclasses.dataclass(frozen=True)
class Visit:
    """A visit to an instruction during the walk.

    Attributes:
        computation: the computation that contains the instruction.
        instruction: the instruction.
        kernel: the outermost fusion around it, or the instruction itself.
        run: a number that identifies each visit to a computation outside fusions (for example, a
            loop body).
        count: how often the instruction runs.
        unknown: an enclosing loop with unknown trip count, which counts as one iteration.
    """

    computation: Computation
    instruction: Instruction
    kernel: Instruction
    run: int
    count: int
    unknown: str | None

    @property
    def fused(self) -> bool:
        """Whether the instruction is inside a fusion."""
        return self.kernel is not self.instruction

    @property
    def times(self) -> int:
        """How often the instruction runs.

        Raises:
            ValueError: the trip count of an enclosing loop is unknown.
        """
        if self.unknown is not None:
            raise ValueError(f"unknown trip count of loop {self.unknown}")
        return self.count


def visits(module: Module, cost: Cost) -> Iterator[Visit]:
    """Visits every instruction of the program, including those in fusions, calls and loops.

    Only the costliest branch of a conditional is visited.
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
                # The condition runs once more than the body, at negligible cost.
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
    """The trip count of a loop; None if unknown.

    CPU and GPU programs state it. TPU programs do not, but a scan can be recognised: its counter
    runs from one constant to another in equal steps. (Products that gather their weights piecewise
    have a step of two, one piece from either side.)
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
