"""Config changes that make a step fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

from prefix_jax.config import MeshConfig
from prefix_jax.plan.abstract import AbstractRun, BatchShape
from prefix_jax.plan.plan import Plan, compile_step
from prefix_jax.plan.topology import Topology

# The number of fitting changes to find; each attempt costs a compilation.
_ENOUGH = 2


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A config change and its compiled plan.

    Attributes:
        settings: the change as a command-line override: "model.remat=full".
        plan: the plan with only this change.
    """

    settings: str
    plan: Plan


def remedies(
    failed: Plan,
    run: AbstractRun,
    shape: BatchShape,
    topology: Topology,
    tried: Callable[[Remedy], None] = lambda _: None,
) -> tuple[Remedy, ...]:
    """Compiles config changes, one at a time, until two of them fit.

    Args:
        failed: the plan that does not fit.
        run, shape, topology: the arguments of that plan.
        tried: called with every change.

    Returns:
        All compiled changes, whether they fit or not.
    """
    remedies: list[Remedy] = []
    for settings, other, changed, sizes in _changes(failed, run, shape, topology):
        plan = compile_step(other, changed, topology, topology.mesh(sizes))
        remedy = Remedy(settings, plan)
        remedies.append(remedy)
        tried(remedy)
        if sum(remedy.plan.fits for remedy in remedies) == _ENOUGH:
            break
    return tuple(remedies)


def _changes(
    failed: Plan, run: AbstractRun, shape: BatchShape, topology: Topology
) -> Iterator[tuple[str, AbstractRun, BatchShape, dict[str, int]]]:
    sizes = dict(failed.mesh)
    model = run.config.model
    trains = run.job == "train"
    if trains and model.remat != "full":
        yield "model.remat=full", run.with_model(remat="full"), shape, sizes
    if model.quantize == "none" and run.model.method is not None:
        yield "model.quantize=int8", run.with_model(quantize="int8"), shape, sizes
    # At most one micro-batch per row of a shard.
    shards = sizes["data"] * sizes["fsdp"]
    most = shape.rows // shards if trains else 1
    for micro in dict.fromkeys((2 * shape.micro, most)):
        if shape.micro < micro <= most and shape.rows % (micro * shards) == 0:
            changed = dataclasses.replace(shape, micro=micro)
            yield f"optim.grad_accum_steps={micro}", run, changed, sizes
    for split in _meshes(failed, run, shape):
        if topology.together(split["sequence"] * split["tensor"]):
            yield _settings(split, run.config.mesh), run, shape, split


def _meshes(failed: Plan, run: AbstractRun, shape: BatchShape) -> Iterator[dict[str, int]]:
    """Meshes that need less memory per device; none with `mesh: auto`, which has tried them all."""
    if run.config.mesh.auto:
        return
    sizes, devices = dict(failed.mesh), failed.devices
    if sizes["data"] > 1:
        yield {**sizes, "data": 1, "fsdp": sizes["data"] * sizes["fsdp"]}
    filled = math.gcd(shape.rows // shape.micro, devices)
    sharing = devices // filled
    if run.job == "train" and sharing > sizes["sequence"] and shape.worth_sharing(sharing):
        yield {"data": 1, "fsdp": filled, "sequence": sharing, "tensor": 1}
    if sizes["tensor"] < devices and run.model.backbone.arch.heads % devices == 0:
        yield {"data": 1, "fsdp": 1, "sequence": 1, "tensor": devices}


def _settings(sizes: Mapping[str, int], given: MeshConfig) -> str:
    """The overrides for a mesh. `mesh.data` is omitted if the config leaves it open (-1)."""
    return " ".join(
        f"mesh.{axis}={size}"
        for axis, size in sizes.items()
        if size != given.sizes[axis] and (axis, given.data) != ("data", -1)
    )
