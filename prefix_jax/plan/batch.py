"""The largest batch that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jax.sharding import Mesh

from prefix_jax.mesh import batch_shards
from prefix_jax.plan.abstract import AbstractRun, Rows
from prefix_jax.plan.plan import Plan, compile_step
from prefix_jax.plan.topology import Topology

# A batch that still fits at so many rows a shard is not searched further: nobody's step.
_MOST = 4096


@dataclasses.dataclass(frozen=True)
class Largest:
    """What was found.

    Attributes:
        rows: of the largest batch that fits; 0 if none does.
        plan: of it; if none fits, of the smallest.
        quickest: of those that were compiled, the one that reads most tokens in a second. Close to
            the limit, the compiler computes products again to save memory.
        above: of the smallest batch that was seen not to fit; None if all did.
        compiled: how many programs that took.
    """

    rows: int
    plan: Plan
    quickest: Plan
    above: Plan | None
    compiled: int


def largest_batch(
    run: AbstractRun,
    rows: Rows,
    topology: Topology,
    mesh: Mesh,
    tried: Callable[[Plan], None] = lambda _: None,
    known: Plan | None = None,
) -> Largest:
    """Compiles a few batches until the largest that fits is known.

    A line through what was compiled says what to try next, as memory grows with rows by as much
    each time, nearly: three or four programs, as a rule.

    Args:
        run: the run.
        rows: of a step; their number is what is sought.
        topology, mesh: the devices. The number is a multiple of the mesh's batch shards, and of
            the micro-batches.
        tried: called with every plan.
        known: the plan of `rows` on this mesh, if there is one: it is not compiled again.
    """
    unit = batch_shards(mesh) * rows.micro
    plans = {} if known is None else {known.rows.rows // unit: known}
    while True:
        fits = max((units for units, plan in plans.items() if plan.fits), default=0)
        above = min((units for units, plan in plans.items() if not plan.fits), default=None)
        if (above is not None and above - fits == 1) or fits >= _MOST:
            break
        units = _next(plans, fits, above) if fits else 1
        count = dataclasses.replace(rows, rows=unit * units)
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
    """How many units to try: where the line through two plans meets the limit."""
    known = sorted(plans)
    limit = plans[known[0]].limit
    if len(known) == 1:
        # All of the temporaries may grow with the rows, and nothing else does.
        (only,) = known
        memory = plans[only].memory
        assert memory is not None  # or the search is over
        each = max(memory.total - memory.weights, 1) / only
        guess = int((limit - memory.weights) / each)
    else:
        # The last that fits, and what is next to it.
        low = fits or known[0]
        high = above if above is not None else max(n for n in known if n < low)
        slope = (plans[high].needs - plans[low].needs) / (high - low)
        guess = low + int((limit - plans[low].needs) / max(slope, 1))
    return max(fits + 1, min(guess, _MOST if above is None else above - 1))
