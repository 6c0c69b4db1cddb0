"""Collectives: communication between devices in a compiled program."""

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
    """A collective operation.

    Attributes:
        kind: the operation.
        op_name: its origin in the traced Python program.
        nbytes: bytes of the full array: the one that is gathered, reduced or scattered.
        groups: ids of the devices in each group, [groups, size]; ids of slices if between slices.
        hidden: whether it overlaps with other work.
        count: the number of times that the program runs it.
        opposed: whether the same operation runs at the same time in the opposite direction, over
            the other direction of the same links.
        written: bytes of the result that fusions write to device memory, not included in
            `bytes_accessed`.
        between_slices: whether it uses the data centre network, between corresponding devices of
            different slices.
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
        """Bytes that each device sends per run, with the best algorithm."""
        n = self.groups.shape[1]
        if self.kind == "collective-permute":
            return self.nbytes
        return self.nbytes * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


def collectives(visits: Sequence[Visit]) -> list[Collective]:
    """Finds all collectives among the visited instructions.

    The TPU compiler spreads an asynchronous collective over several fusions, some of them in loops
    that run at the same time. Each fusion names the collective, and one of them starts it.
    """
    starting = {
        (visit.run, visit.kernel.name)
        for visit in visits
        if visit.instruction.word("custom_call_target") == "AsyncCollectiveStart"
    }
    started = {
        visit.instruction.word("channel_id")
        for visit in visits
        if (visit.run, visit.kernel.name) in starting
    }
    pairs = {(visit.run, _pairs(visit.instruction)) for visit in visits}
    collected, seen = [], set()
    for visit in visits:
        instruction = visit.instruction
        if instruction.opcode == "send":
            collected.append(_between_slices(visit))
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
        collected.append(
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
    return collected


def _between_slices(visit: Visit) -> Collective:
    """A collective between slices, which a program runs as a send to and a receive from its host,
    overlapping with other work."""
    instruction = visit.instruction
    kind = _BETWEEN_SLICES.get(instruction.word("_xla_megascale_transfer_type") or "")
    if kind is None:
        raise ValueError(
            f"cannot parse the transfer {instruction.name}: {instruction.attributes:.300}"
        )
    slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}x', instruction.attributes)
    groups = np.array([_numbers(slices[1]) if slices else (1, 2)])
    array = visit.computation[instruction.operands[0]].results[0]
    whole = array.nbytes * (groups.shape[1] if kind == "all-gather" else 1)
    return Collective(
        kind, instruction.op_name, whole, groups, True, visit.count, between_slices=True
    )


def _whole(visit: Visit, kind: Kind, size: int) -> int:
    """Bytes of the full array that is gathered, reduced, scattered or sent."""
    operands = [
        array for name in visit.instruction.operands for array in visit.computation[name].results
    ]
    given = sum(array.nbytes for array in operands)
    return given * size if kind == "all-gather" else given


def _pairs(instruction: Instruction) -> tuple[tuple[int, int], ...]:
    """(source, target) pairs of a permutation, without pairs of a device with itself."""
    match = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes)
    pairs = re.findall(r"(\d+),(\d+)", match[1]) if match else ()
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
    raise ValueError(f"cannot parse the device groups of {instruction.name}: {text:.200}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _iota(text: str) -> np.ndarray:
    """Evaluates an iota such as "[2,4]T(1,0)": numbers from 0, reshaped and transposed."""
    match: Any = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    dims = _numbers(match[1])
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return numbers.transpose(_numbers(match[2])) if match[2] else numbers
