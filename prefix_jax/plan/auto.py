"""Searches for the fastest mesh on which a step fits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

from prefix_jax.config import Config, MeshConfig
from prefix_jax.errors import MeshError
from prefix_jax.mesh import describe
from prefix_jax.plan.abstract import AbstractRun, BatchShape
from prefix_jax.plan.plan import Plan, bytes_on_one, compile_step, floor_of
from prefix_jax.plan.topology import Topology

Sizes = Mapping[str, int]

# The number of fitting programs to compare; programs that do not fit are not counted.
_FEW = 3
# Relative step times closer than this are a tie: the mesh that splits the weights least wins.
_CLOSE = 0.02


@dataclasses.dataclass(frozen=True)
class Guess:
    """Estimate for a mesh, before anything is compiled.

    Attributes:
        sizes: axis sizes.
        seconds: estimated time of a step.
        weights: bytes of the backbone on one device.
    """

    sizes: Sizes
    seconds: float
    weights: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """Result of a mesh search.

    Attributes:
        best: the plan of the chosen mesh.
        compiled: the plans of all compiled meshes, in order.
        possible: the number of possible meshes.
    """

    best: Plan
    compiled: tuple[Plan, ...]
    possible: int


def choose_mesh(
    run: AbstractRun,
    shape: BatchShape,
    topology: Topology,
    tried: Callable[[Plan], None] = lambda _: None,
) -> Choice:
    """Compiles the step on the most promising meshes and chooses the fastest that fits.

    The gradients of a prefix are kilobytes, so copies of the backbone (data) need almost no network
    and are preferred if they fit. Otherwise the weights are split and gathered at their use (fsdp),
    or each layer is split and activations are exchanged (tensor). If there are fewer rows than
    devices, devices may share the columns of long rows (sequence).

    Args:
        run: the run.
        shape: the batch of a step.
        topology: the chips.
        tried: called with every plan.

    Raises:
        MeshError: the rows divide over no mesh.
    """
    guesses = sorted(
        (guess(run, shape, topology, sizes) for sizes in meshes(run, shape, topology)),
        key=lambda estimate: (estimate.seconds, -estimate.weights),
    )
    if not guesses:
        hosts = "" if topology.hosts == 1 else f" on {topology.hosts} hosts"
        raise MeshError(
            f"{shape.rows} rows in {shape.micro} micro-batches divide over no mesh of "
            f"{len(topology.devices)} devices{hosts}; choose another data.batch_size"
        )
    limit = topology.hbm_limit
    hopeful = [estimate for estimate in guesses if estimate.weights < limit] or guesses[-1:]
    plans: list[Plan] = []
    best: Plan | None = None
    for estimate in hopeful:
        if best is not None and best.roofline is not None:
            fitting = sum(plan.fits for plan in plans)
            # A guess is a lower bound: no program on this mesh is faster.
            if fitting >= _FEW or estimate.seconds > best.roofline.seconds:
                break
        plan = compile_step(run, shape, topology, topology.mesh(estimate.sizes))
        plans.append(plan)
        tried(plan)
        best = better(best, plan)
    assert best is not None  # `hopeful` is not empty
    return Choice(best, tuple(plans), len(guesses))


def better(one: Plan | None, other: Plan) -> Plan:
    """The faster of two plans that fit; if neither fits, the one with less memory missing."""
    if one is None or (other.fits and not one.fits):
        return other
    if one.roofline is None or other.roofline is None:
        return one if one.fits or one.over <= other.over else other
    ratio = other.roofline.seconds / one.roofline.seconds
    if abs(ratio - 1) > _CLOSE:
        return one if ratio > 1 else other
    return one if _split(one.mesh) <= _split(other.mesh) else other


def _split(sizes: Sizes) -> int:
    return sizes["fsdp"] * sizes["sequence"] * sizes["tensor"]


def meshes(run: AbstractRun, shape: BatchShape, topology: Topology) -> Iterator[Sizes]:
    """The meshes over which the rows (on every host) and the heads divide. Columns are split only
    if there are no more rows to split."""
    devices, arch = len(topology.devices), run.model.backbone.arch
    count = shape.rows // shape.micro
    for tensor, sequence in itertools.product(_divisors(devices), repeat=2):
        if devices % (tensor * sequence) or arch.heads % tensor or arch.d_ff % tensor:
            continue
        if not topology.together(tensor * sequence):
            continue
        if sequence > 1 and not (run.job == "train" and shape.worth_sharing(sequence)):
            continue
        shards = devices // tensor // sequence
        # Every host loads its own rows.
        if shards % topology.hosts:
            continue
        if count % shards or (sequence > 1 and math.gcd(count, shards * sequence) > shards):
            continue
        for fsdp in _divisors(shards):
            if arch.d_model % (fsdp * sequence) == 0:
                yield {
                    "data": shards // fsdp,
                    "fsdp": fsdp,
                    "sequence": sequence,
                    "tensor": tensor,
                }


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def guess(run: AbstractRun, shape: BatchShape, topology: Topology, sizes: Sizes) -> Guess:
    """A lower bound of the step time. Products with weights run at peak and overlap with gathering
    the weights, also from other slices. Exchanges of activations do not overlap. All links of a
    chip are used in both directions."""
    arch, chip = run.model.backbone.arch, topology.chip
    backbone = run.params(topology.mesh(sizes))["backbone"]
    weights = bytes_on_one(backbone)
    trains = run.job == "train"
    tokens = shape.rows * (shape.tokens + shape.source if trains else 1)
    devices = len(topology.devices)
    # Passes over the weights: forward, backward, and recomputation of the forward pass.
    passes = 2 + (run.config.model.remat == "full") if trains else 1
    if trains:
        least = floor_of(arch, shape, produced=None)
        flops = least.layers * passes / 2 + least.head
    else:
        flops = 2 * tokens * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(backbone))
    compute = flops / devices / (chip.bf16 / chip.devices)
    sharing, tensor = sizes["fsdp"] * sizes["sequence"], sizes["tensor"]
    read = passes * weights * sharing / (chip.bandwidth / chip.devices)
    links = 2 * chip.axes * chip.link / chip.devices
    gathered = passes * weights * (sharing - 1) / links
    # The number of slices that a copy of the weights spans.
    spanned = max(sharing * tensor * topology.slices // devices, 1)
    abroad = passes * weights * (spanned - 1) / (chip.dcn / chip.devices)
    here = tokens / sizes["data"] / sharing * 2
    # All-reduces after attention and after the feed-forward, in every pass.
    summed = 2 * passes * arch.layers * here * arch.d_model * 2 * (tensor - 1) / tensor / links
    # Keys and values of the columns on other devices.
    heads = 2 * arch.kv_heads * arch.head_dim / tensor
    shared = passes * arch.layers * here * heads * (sizes["sequence"] - 1) / links
    return Guess(sizes, max(compute, read, gathered, abroad) + summed + shared, weights)


def settle(config: Config, devices: Sequence[jax.Device] | None = None) -> Config:
    """Replaces `mesh: auto` in a config by the mesh chosen for the attached devices. Other configs
    are returned unchanged.

    Args:
        config: the config of a training run.
        devices: None for all devices of this machine.

    Raises:
        MeshError: there are several devices that are not TPUs, or the step fits on no mesh.
    """
    if not config.mesh.auto:
        return config
    devices = jax.devices() if devices is None else devices
    sizes: Sizes = {"data": 1}
    if len(devices) > 1:
        run = AbstractRun.of(config)
        best = choose_mesh(run, run.batch_shape(), Topology.of(devices)).best
        if not best.fits:
            raise MeshError(
                f"mesh: auto: the step fits on no mesh of {len(devices)} devices; on "
                f"{describe(best.mesh)} it is {best.over / 2**30:.1f} GiB over the limit. "
                "Run prefix-jax plan to find config changes that make it fit"
            )
        sizes = best.mesh
    return dataclasses.replace(config, mesh=MeshConfig(**sizes, auto=False))
