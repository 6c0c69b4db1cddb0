"""Roofline model: the minimum time of a compiled program on its chips."""

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
from prefix_jax.plan.traffic import bytes_accessed
from prefix_jax.plan.walk import visits

Bound = Literal["compute", "memory", "network"]

# Approximate latency between neighbouring chips: https://jax-ml.github.io/scaling-book/sharding.
_HOP = 1e-6
# Suffix to the kind of a collective.
_BETWEEN = " between slices"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All collectives of one kind.

    Attributes:
        count: the number per step.
        sent: bytes that each device sends in total.
        seconds: the sum of their times.
    """

    count: int
    sent: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Work of one device in a step, and its time at peak performance.

    The time of a kernel is the longer of its compute time and its memory time. Collectives that
    overlap with kernels add only the part that is not hidden; others add their full time. Real
    steps are slower, because no program runs at peak.

    Attributes:
        flops: operations of matrix products, including known kernels.
        bytes_accessed: bytes moved between device memory and chip.
        exchanges: collectives by kind, with separate entries for those between slices.
        compute: seconds of the products.
        memory: seconds of the memory traffic.
        network: seconds of all collectives.
        seconds: seconds of the step.
    """

    flops: int
    bytes_accessed: int
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
        """The resource that limits the step."""
        times: dict[Bound, float] = {
            "compute": self.compute,
            "memory": self.memory,
            "network": self.network,
        }
        return max(times, key=times.__getitem__)


def roofline(
    module: Module, topology: Topology, devices: Sequence[object], *, causal: bool = False
) -> Roofline:
    """Computes the roofline of a compiled program.

    Args:
        module: the program of one device.
        topology: the chips.
        devices: the devices in the order of the program's device ids: that of the mesh.
        causal: whether attention is causal: see `kernel`.

    Raises:
        ValueError: a loop contains products, but its trip count is unknown.
    """
    visited = list(visits(module, cost))
    peak = topology.chip.bf16 / topology.chip.devices
    fast = topology.chip.int8 / topology.chip.devices
    bandwidth = topology.chip.bandwidth / topology.chip.devices

    flops = traffic = 0
    compute = 0.0
    # Compute and memory seconds per kernel.
    products: dict[tuple[int, str], float] = collections.defaultdict(float)
    memory: dict[tuple[int, str], float] = collections.defaultdict(float)
    ahead = 0.0
    for visit in visited:
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
        if each := bytes_accessed(module, visit) + (0 if known is None else known.again):
            traffic += each * visit.count
            seconds = each * visit.count / bandwidth
            if visit.instruction.opcode.endswith("-start"):
                ahead += seconds
            else:
                memory[key] += seconds
    kernels = sum(max(products[key], memory[key]) for key in products.keys() | memory.keys())
    exchanges = collectives(visited)
    traffic += sum(one.count * one.written for one in exchanges)
    times = [(one, one.count * seconds_of(one, topology, devices)) for one in exchanges]
    # The two networks work in parallel.
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
        bytes_accessed=traffic,
        exchanges=by_kind,
        compute=compute,
        memory=in_memory,
        network=sum(seconds for _, seconds in times),
        seconds=max(kernels, in_memory, hidden) + exposed,
    )


def _name(one: Collective) -> str:
    return f"{one.kind}{_BETWEEN * one.between_slices}"


def seconds_of(one: Collective, topology: Topology, devices: Sequence[object]) -> float:
    """Time of one collective: that of its slowest group, as all groups run in parallel."""
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
            # On a ring or a line, a quarter of an all-gather (JAX scaling book).
            sent = one.nbytes * len(numbers) / 4
        slowest = max(slowest, sent / bandwidth + hops * _HOP)
    return slowest


def _permuting(one: Collective, topology: Topology, devices: Sequence[object]) -> float:
    """Time of a permutation, whose pairs share the links between them."""
    pairs = [[devices[number] for number in pair] for pair in one.groups]
    if any(_across_slices(pair) for pair in pairs):
        return one.nbytes / (topology.chip.dcn / topology.chip.devices)
    hops = [_links(pair, topology)[1] for pair in pairs]
    link = topology.chip.link / topology.chip.devices * (2 if one.opposed else 1)
    return one.nbytes * float(np.mean(hops)) / link + max(hops) * _HOP


def _across_slices(members: Sequence[object]) -> bool:
    return len({getattr(device, "slice_index", None) for device in members}) > 1


def _links(members: Sequence[object], topology: Topology) -> tuple[float, int]:
    """Bytes per second that each device can send to the others, and the hops between them."""
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
        # Two devices of one chip: their connection is faster than all links of the chip together.
        return 6 * chip.link, 1
    # If the chips are not contiguous, they share links with the chips in between.
    filled = len(np.unique(coords, axis=0)) / math.prod(int(span) for span in spans)
    return links * chip.link * filled / chip.devices, hops
