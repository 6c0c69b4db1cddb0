"""Which mesh is the fastest that fits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

from prefix_jax.config import Config, MeshConfig
from prefix_jax.errors import MeshError
from prefix_jax.mesh import describe
from prefix_jax.plan.abstract import AbstractRun, Rows
from prefix_jax.plan.plan import Plan, bytes_on_one, compile_step, floor_of
from prefix_jax.plan.topology import Topology

Sizes = Mapping[str, int]

# Programs that fit and are compared; those that turn out not to fit come on top.
_FEW = 3
# Meshes within so much of the fastest are as good: the one that keeps weights wholest wins.
_CLOSE = 0.02


@dataclasses.dataclass(frozen=True)
class Guess:
    """What can be said of a mesh before anything is compiled.

    Attributes:
        sizes: of its axes.
        seconds: of a step, about.
        weights: bytes of the backbone on one device.
    """

    sizes: Sizes
    seconds: float
    weights: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """The mesh that was chosen.

    Attributes:
        best: its plan.
        compiled: the plans of all that were compiled, in their order.
        possible: how many meshes there were.
    """

    best: Plan
    compiled: tuple[Plan, ...]
    possible: int


def choose_mesh(
    run: AbstractRun,
    rows: Rows,
    topology: Topology,
    tried: Callable[[Plan], None] = lambda _: None,
) -> Choice:
    """Compiles the step on the meshes that promise most, and takes the fastest that fits.

    A prefix's gradients are kilobytes, so copies of the backbone (data) need next to no network
    and are taken where they fit. Else the weights are split and gathered as they are used (fsdp),
    or each layer is (tensor), which exchanges activations. Devices for which there is no row may
    share the columns of long ones (sequence).

    Args:
        run: the run.
        rows: of its step.
        topology: the chips.
        tried: called with every plan.

    Raises:
        MeshError: the rows divide over none.
    """
    guesses = sorted(
        (guess(run, rows, topology, sizes) for sizes in meshes(run, rows, topology)),
        key=lambda made: (made.seconds, -made.weights),
    )
    if not guesses:
        hosts = "" if topology.hosts == 1 else f" on {topology.hosts} hosts"
        raise MeshError(
            f"{rows.rows} rows in {rows.micro} micro-batches divide over no mesh of "
            f"{len(topology.devices)} devices{hosts}; choose data.batch_size accordingly"
        )
    limit = topology.hbm_limit
    hopeful = [made for made in guesses if made.weights < limit] or guesses[-1:]
    plans: list[Plan] = []
    best: Plan | None = None
    for made in hopeful:
        if best is not None and best.roofline is not None:
            fitting = sum(plan.fits for plan in plans)
            # A guess is a floor: no program of this mesh is faster.
            if fitting >= _FEW or made.seconds > best.roofline.seconds:
                break
        plan = compile_step(run, rows, topology, topology.mesh(made.sizes))
        plans.append(plan)
        tried(plan)
        best = better(best, plan)
    assert best is not None  # as there is a hopeful one
    return Choice(best, tuple(plans), len(guesses))


def better(one: Plan | None, other: Plan) -> Plan:
    """The faster of two that fit; of two that do not, the one that lacks less."""
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


def meshes(run: AbstractRun, rows: Rows, topology: Topology) -> Iterator[Sizes]:
    """The meshes that the rows divide over, each host's among them, and the heads can be split by.
    Columns are split where rows are not left to split."""
    devices, arch = len(topology.devices), run.model.backbone.arch
    count = rows.rows // rows.micro
    for tensor, sequence in itertools.product(_divisors(devices), repeat=2):
        if devices % (tensor * sequence) or arch.heads % tensor or arch.d_ff % tensor:
            continue
        if not topology.together(tensor * sequence):
            continue
        if sequence > 1 and not (run.job == "train" and rows.worth_sharing(sequence)):
            continue
        shards = devices // tensor // sequence
        # Every host sends rows of its own.
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


def guess(run: AbstractRun, rows: Rows, topology: Topology, sizes: Sizes) -> Guess:
    """A floor of the time of a step: products with weights at the peak, the gathering of weights
    hidden behind them, from other slices too, the exchange of activations not, and all links of a
    chip used both ways."""
    arch, chip = run.model.backbone.arch, topology.chip
    backbone = run.params(topology.mesh(sizes))["backbone"]
    weights = bytes_on_one(backbone)
    trains = run.job == "train"
    tokens = rows.rows * (rows.tokens + rows.source if trains else 1)
    devices = len(topology.devices)
    # How often the weights are gone through: forwards, backwards, and forwards again.
    passes = 2 + (run.config.model.remat == "full") if trains else 1
    if trains:
        least = floor_of(arch, rows, produced=None)
        flops = least.layers * passes / 2 + least.head
    else:
        flops = 2 * tokens * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(backbone))
    compute = flops / devices / (chip.bf16 / chip.devices)
    sharing, tensor = sizes["fsdp"] * sizes["sequence"], sizes["tensor"]
    read = passes * weights * sharing / (chip.bandwidth / chip.devices)
    links = 2 * chip.axes * chip.link / chip.devices
    gathered = passes * weights * (sharing - 1) / links
    # Slices that a copy of the weights is spread over.
    spanned = max(sharing * tensor * topology.slices // devices, 1)
    abroad = passes * weights * (spanned - 1) / (chip.dcn / chip.devices)
    here = tokens / sizes["data"] / sharing * 2
    # After attention and after the feed-forward, forwards and backwards.
    summed = 2 * passes * arch.layers * here * arch.d_model * 2 * (tensor - 1) / tensor / links
    # Keys and values of the columns of others.
    heads = 2 * arch.kv_heads * arch.head_dim / tensor
    shared = passes * arch.layers * here * heads * (sizes["sequence"] - 1) / links
    return Guess(sizes, max(compute, read, gathered, abroad) + summed + shared, weights)


def settle(config: Config, devices: Sequence[jax.Device] | None = None) -> Config:
    """The config with the mesh that `mesh: auto` asks for, on devices that are there; any other
    as it is.

    Args:
        config: of a training run.
        devices: None takes all of this machine.

    Raises:
        MeshError: the devices are several and no TPUs, or nothing fits them.
    """
    if not config.mesh.auto:
        return config
    devices = jax.devices() if devices is None else devices
    sizes: Sizes = {"data": 1}
    if len(devices) > 1:
        run = AbstractRun.of(config)
        best = choose_mesh(run, run.rows(), Topology.of(devices)).best
        if not best.fits:
            raise MeshError(
                f"mesh: auto: the step fits {len(devices)} devices on no mesh; on "
                f"{describe(best.mesh)} it takes {best.over / 2**30:.1f} GiB too much. "
                "See prefix-jax plan"
            )
        sizes = best.mesh
    return dataclasses.replace(config, mesh=MeshConfig(**sizes, auto=False))
