"""What would make a step fit that does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from prefix_jax.plan.abstract import AbstractRun, Rows
from prefix_jax.plan.plan import Plan, compile_step
from prefix_jax.plan.topology import Topology

# Enough to choose from; every one costs a compilation.
_ENOUGH = 2


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change of the config, and the plan that was compiled with it.

    Attributes:
        settings: as one writes it behind a config: "model.remat=full".
        plan: with this change alone, or beside those named before it.
    """

    settings: str
    plan: Plan


def remedies(
    failed: Plan,
    run: AbstractRun,
    rows: Rows,
    topology: Topology,
    tried: Callable[[Remedy], None] = lambda _: None,
) -> tuple[Remedy, ...]:
    """Compiles changes of a config, one at a time, until some of them fit.

    Args:
        failed: the plan that does not fit.
        run, rows, topology: of it.
        tried: called with every change.

    Returns:
        all that were compiled, whether they fit or not.
    """
    found: list[Remedy] = []
    for settings, other, changed, sizes in _changes(failed, run, rows):
        plan = compile_step(other, changed, topology, topology.mesh(sizes))
        remedy = Remedy(settings, plan)
        found.append(remedy)
        tried(remedy)
        if sum(one.plan.fits for one in found) == _ENOUGH:
            break
    return tuple(found)


def _changes(
    failed: Plan, run: AbstractRun, rows: Rows
) -> Iterator[tuple[str, AbstractRun, Rows, dict[str, int]]]:
    sizes = dict(failed.mesh)
    model = run.config.model
    trains = run.job == "train"
    if trains and model.remat != "full":
        yield "model.remat=full", run.with_model(remat="full"), rows, sizes
    if model.quantize == "none" and run.model.method is not None:
        yield "model.quantize=int8", run.with_model(quantize="int8"), rows, sizes
    # As many micro-batches as there are rows for each shard.
    shards = sizes["data"] * sizes["fsdp"]
    most = rows.rows // shards if trains else 1
    for micro in dict.fromkeys((2 * rows.micro, most)):
        if rows.micro < micro <= most and rows.rows % (micro * shards) == 0:
            changed = dataclasses.replace(rows, micro=micro)
            yield f"optim.accumulate={micro}", run, changed, sizes
    if sizes["data"] > 1:
        split = {**sizes, "data": 1, "fsdp": shards}
        yield f"mesh.fsdp={shards}", run, rows, split
    whole = failed.devices
    heads = run.model.backbone.arch.heads
    if sizes["tensor"] < whole and heads % whole == 0:
        yield f"mesh.tensor={whole}", run, rows, {"data": 1, "fsdp": 1, "tensor": whole}
