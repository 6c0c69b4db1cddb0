"""How long a compiled program takes at least, by the figures of the chips that it is for."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from prefix_jax.plan.collectives import KINDS, Collective, collectives
from prefix_jax.plan.hlo import Module
from prefix_jax.plan.kernels import kernel
from prefix_jax.plan.products import cost
from prefix_jax.plan.topology import Topology
from prefix_jax.plan.traffic import moved
from prefix_jax.plan.walk import visits

Bound = Literal["compute", "memory", "network"]

# From one chip to its neighbour, about: https://jax-ml.github.io/scaling-book/sharding.
_HOP = 1e-6
# Behind the kind of an exchange.
_BETWEEN = " between slices"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The collectives of one kind.

    Attributes:
        count: how many a step does.
        sent: bytes that each device sends in all of them.
        seconds: that they take, one after another.
    """

    count: int
    sent: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What one device does in a step, and how long it takes at the peak of what it can.

    A kernel takes what its products or its memory traffic take, whichever is longer. Exchanges
    that the compiler lets go on beside kernels cost what these do not hide, others all they take.
    Real steps are slower: no program runs at the peak.

    Attributes:
        flops: of matrix products, those of known kernels among them.
        moved: bytes between memory and chip.
        exchanges: by kind, those that there are; those between slices apart.
        compute: seconds of the products alone.
        memory: seconds of the memory traffic alone.
        network: seconds of all exchanges alone.
        seconds: of the step.
    """

    flops: int
    moved: int
    exchanges: Mapping[str, Exchange]
    compute: float
    memory: float
    network: float
    seconds: float

    @property
    def sent(self) -> int:
        """Bytes that each device sends."""
        return sum(exchange.sent for exchange in self.exchanges.values())

    @property
    def bound(self) -> Bound:
        """What takes longest."""
        times: dict[Bound, float] = {
            "compute": self.compute,
            "memory": self.memory,
            "network": self.network,
        }
        return max(times, key=times.__getitem__)


def roofline(
    module: Module, topology: Topology, devices: Sequence[object], *, causal: bool = False
) -> Roofline:
    """Reads a compiled program.

    Args:
        module: the program of one device.
        topology: the chips.
        devices: in the order in which the program numbers them: that of the mesh.
        causal: whether attention is causal: see `kernel`.

    Raises:
        ValueError: a loop holds products, and the text does not tell how often it runs.
    """
    found = list(visits(module, cost))
    peak = topology.chip.bf16 / topology.chip.devices
    fast = topology.chip.int8 / topology.chip.devices
    bandwidth = topology.chip.bandwidth / topology.chip.devices

    flops = traffic = 0
    compute = 0.0
    # By kernel, seconds of its products and of its memory traffic.
    products: dict[tuple[int, str], float] = collections.defaultdict(float)
    memory: dict[tuple[int, str], float] = collections.defaultdict(float)
    ahead = 0.0
    for visit in found:
        key = visit.run, visit.kernel.name
        if each := cost(visit.computation, visit.instruction):
            operands = visit.instruction.operands[:2]
            types = {visit.computation[name].results[0].dtype for name in operands}
            seconds = each * visit.times / (fast if types <= {"s8", "u8"} else peak)
            flops += each * visit.times
            compute += seconds
            products[key] += seconds
        known = kernel(visit.computation, visit.instruction, causal)
        if known is not None:
            flops += known.flops * visit.times
            compute += known.flops * visit.times / peak
            products[key] += known.flops * visit.times / peak
        if each := moved(module, visit) + (0 if known is None else known.again):
            traffic += each * visit.count
            seconds = each * visit.count / bandwidth
            if visit.instruction.opcode.endswith("-start"):
                ahead += seconds
            else:
                memory[key] += seconds
    kernels = sum(max(products[key], memory[key]) for key in products.keys() | memory.keys())
    exchanges = collectives(found)
    traffic += sum(one.count * one.written for one in exchanges)
    times = [(one, one.count * seconds_of(one, topology, devices)) for one in exchanges]
    # Two networks, at the same time.
    hidden = max(
        sum(seconds for one, seconds in times if one.hidden and one.between_slices is between)
        for between in (False, True)
    )
    exposed = sum(seconds for one, seconds in times if not one.hidden)
    names = [f"{kind}{suffix}" for suffix in ("", _BETWEEN) for kind in KINDS]
    by_kind = {
        name: Exchange(
            sum(one.count for one, _ in of_it),
            round(sum(one.count * one.sent for one, _ in of_it)),
            sum(seconds for _, seconds in of_it),
        )
        for name in names
        if (of_it := [(one, seconds) for one, seconds in times if _name(one) == name])
    }
    in_memory = traffic / bandwidth
    return Roofline(
        flops=flops,
        moved=traffic,
        exchanges=by_kind,
        compute=compute,
        memory=in_memory,
        network=sum(seconds for _, seconds in times),
        seconds=max(kernels, in_memory, hidden) + exposed,
    )


def _name(one: Collective) -> str:
    return f"{one.kind}{_BETWEEN * one.between_slices}"


def seconds_of(one: Collective, topology: Topology, devices: Sequence[object]) -> float:
    """How long one exchange takes: that of its slowest group, all of them at once."""
    if one.between_slices:
        return one.sent / (topology.chip.dcn / topology.chip.devices)
    if one.kind == "collective-permute":
        return _permuting(one, topology, devices)
    slowest = 0.0
    for numbers in one.groups:
        members = [devices[number] for number in numbers]
        bandwidth, hops = _links(members, topology)
        sent = one.sent
        if one.kind == "all-to-all":
            # Around a ring or along a line, a quarter of a gathering (jax-ml scaling book).
            sent = one.nbytes * len(numbers) / 4
        slowest = max(slowest, sent / bandwidth + hops * _HOP)
    return slowest


def _permuting(one: Collective, topology: Topology, devices: Sequence[object]) -> float:
    """Of a permutation: all of its pairs share the links between them."""
    pairs = [[devices[number] for number in pair] for pair in one.groups]
    if any(_across_slices(pair) for pair in pairs):
        return one.nbytes / (topology.chip.dcn / topology.chip.devices)
    hops = [_links(pair, topology)[1] for pair in pairs]
    link = topology.chip.link / topology.chip.devices * (2 if one.opposed else 1)
    return one.nbytes * float(np.mean(hops)) / link + max(hops) * _HOP


def _across_slices(members: Sequence[object]) -> bool:
    return len({getattr(device, "slice_index", None) for device in members}) > 1


def _links(members: Sequence[object], topology: Topology) -> tuple[float, int]:
    """Bytes a second that each of these devices can send to the others, and hops between them."""
    chip = topology.chip
    if _across_slices(members):
        return chip.dcn / chip.devices, 1
    coords = np.array([getattr(device, "coords", (0, 0, 0)) for device in members])
    shape = (*topology.shape, 1, 1)
    spans = coords.max(0) - coords.min(0) + 1
    links = hops = 0
    for span, size in zip(spans, shape, strict=False):
        if span > 1:
            ring = span == size >= chip.ring
            links += 2 if ring else 1
            hops += math.ceil((span - 1) / (2 if ring else 1))
    if not links:
        # Two devices of one chip, between which there is more than all of its links together.
        return 6 * chip.link, 1
    # Of chips that stand apart, the links are shared with those between them.
    filled = len(np.unique(coords, axis=0)) / math.prod(int(span) for span in spans)
    return links * chip.link * filled / chip.devices, hops
