"""Searches for the largest batch that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jax.sharding import Mesh

from prefix_jax.mesh import batch_shards
from prefix_jax.plan.abstract import AbstractRun, BatchShape
from prefix_jax.plan.plan import Plan, compile_step
from prefix_jax.plan.topology import Topology

# The search ends at this many rows per shard, far beyond practical steps.
_MOST = 4096


@dataclasses.dataclass(frozen=True)
class Largest:
    """Result of a batch search.

    Attributes:
        rows: the number of rows of the largest batch that fits; 0 if none fits.
        plan: the plan of that batch; if none fits, of the smallest one.
        quickest: the compiled plan with the most tokens per second. It may be smaller than `plan`:
            close to the limit, the compiler recomputes products to save memory.
        above: the plan of the smallest batch known not to fit; None if all compiled batches fit.
        compiled: the number of compiled programs.
    """

    rows: int
    plan: Plan
    quickest: Plan
    above: Plan | None
    compiled: int


def largest_batch(
    run: AbstractRun,
    shape: BatchShape,
    topology: Topology,
    mesh: Mesh,
    tried: Callable[[Plan], None] = lambda _: None,
    known: Plan | None = None,
) -> Largest:
    """Compiles a few batches until the largest that fits is known.

    Memory grows almost linearly with rows, so a line through two compiled plans predicts the next
    batch to try: usually three or four programs are enough.

    Args:
        run: the run.
        shape: the batch of a step, whose number of rows is varied.
        topology, mesh: the devices. The number of rows is a multiple of the mesh's batch shards
            and of the micro-batches.
        tried: called with every plan.
        known: the plan of `shape` on this mesh if there is one, to avoid compiling it again.
    """
    unit = batch_shards(mesh) * shape.micro
    plans = {} if known is None else {known.batch.rows // unit: known}
    while True:
        fits = max((units for units, plan in plans.items() if plan.fits), default=0)
        above = min((units for units, plan in plans.items() if not plan.fits), default=None)
        if (above is not None and above - fits == 1) or fits >= _MOST:
            break
        units = _next(plans, fits, above) if fits else 1
        count = dataclasses.replace(shape, rows=unit * units)
        plans[units] = compile_step(run, count, topology, mesh)
        tried(plans[units])
    return Largest(
        rows=fits * unit,
        plan=plans[fits or 1],
        quickest=max(plans.values(), key=lambda plan: plan.tokens_per_second or 0),
        above=None if above is None else plans[above],
        compiled=len(plans),
    )


def _next(plans: dict[int, Plan], fits: int, above: int | None) -> int:
    """The number of units to try next: where the line through two plans meets the limit."""
    known = sorted(plans)
    limit = plans[known[0]].limit
    if len(known) == 1:
        # Assume that everything except the weights grows with the rows.
        (only,) = known
        memory = plans[only].memory
        assert memory is not None  # otherwise the search has ended
        each = max(memory.total - memory.weights, 1) / only
        guess = int((limit - memory.weights) / each)
    else:
        # The largest batch that fits, and its nearest neighbour.
        low = fits or known[0]
        high = above if above is not None else max(n for n in known if n < low)
        slope = (plans[high].needs - plans[low].needs) / (high - low)
        guess = low + int((limit - plans[low].needs) / max(slope, 1))
    return max(fits + 1, min(guess, _MOST if above is None else above - 1))
