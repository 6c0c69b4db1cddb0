"""The training loop.

Each step is dispatched before the metrics of the previous one are read, so the devices never wait
for the host. Everything else that happens during training (evaluation, checkpoints, console, metric
writers, process sync, watchdog, profiler) is a `Hook`; those of a run are in `prefix_jax.runs`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from prefix_jax.data.batch import Batch
from prefix_jax.errors import NonFiniteError
from prefix_jax.mesh import place_rows, replicated
from prefix_jax.train.program import Program
from prefix_jax.train.step import StepMetrics, TrainState


class Hook:
    """Reacts to the events of a training loop. Every method does nothing unless overridden.

    The loop calls hooks in their order. For step N it calls `on_dispatch`; then, for each hook that
    is `due`, `on_state`. `on_metrics` of step N follows once they are known: before the first
    `on_state` of step N, otherwise while step N + 1 runs.
    """

    def on_dispatch(self, step: int, proceed: jax.Array) -> jax.Array:
        """Receives `proceed`, a bool on the devices, after a step was dispatched.

        Returns:
            `proceed` for the next step: if it is False, that step changes nothing.
        """
        return proceed

    def on_metrics(self, step: int, metrics: Mapping[str, float], seconds: float) -> bool:
        """Receives the metrics of a step and the time since the previous ones.

        Returns:
            Whether to stop after the step that was dispatched last.
        """
        return False

    def on_nonfinite(self, step: int, metrics: Mapping[str, float], state: TrainState) -> None:
        """Receives the state before a step whose loss or gradient is not finite."""

    def due(self, step: int, last: bool) -> bool:
        """Returns whether the hook needs the state after a step. The loop then waits for it."""
        return False

    def on_state(self, step: int, state: TrainState, last: bool) -> bool:
        """Receives the state after a step, which the next step consumes.

        Returns:
            Whether to stop after this step.
        """
        return False


def train(
    program: Program,
    state: TrainState,
    batches: Iterable[Batch],
    hooks: Sequence[Hook] = (),
    *,
    mesh: Mesh,
) -> TrainState:
    """Trains until the last step of the program, or until a hook stops it.

    Args:
        program: the compiled step, its frozen parameters, the schedule and the number of steps.
        state: the state to start from; consumed.
        batches: one per step that remains, as `micro_batches` yields them.
        hooks: called in this order.
        mesh: the devices.

    Returns:
        The state after the last step.

    Raises:
        NonFiniteError: a loss or its gradient is not finite. The state did not change since.
    """
    proceed = jax.device_put(np.bool_(True), replicated(mesh))
    pending: tuple[int, StepMetrics] | None = None
    clock = time.perf_counter()

    def flush_metrics() -> bool:
        """Waits for the metrics of the pending step; returns whether a hook stops the training."""
        nonlocal pending, clock
        if pending is None:
            return False
        (step, metrics), pending = pending, None
        values = {name: float(value) for name, value in vars(jax.device_get(metrics)).items()}
        now = time.perf_counter()
        seconds, clock = now - clock, now
        if not values.pop("finite"):
            # Neither this step nor the one after it, if dispatched, has changed the state.
            for hook in hooks:
                hook.on_nonfinite(step, values, state)
            raise NonFiniteError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}"
            )
        values["learning_rate"] = float(program.schedule(step - 1))
        stop = False
        for hook in hooks:
            stop = hook.on_metrics(step, values, seconds) or stop
        return stop

    for step, batch in enumerate(batches, int(state.step) + 1):
        with jax.set_mesh(mesh), jax.profiler.StepTraceAnnotation("train", step_num=step - 1):
            state, metrics = program.step(state, program.frozen, batch, proceed)
        # Reads the metrics of the previous step: this one is running already.
        last = flush_metrics() or step == program.steps
        pending, proceed = (step, metrics), metrics.finite
        for hook in hooks:
            proceed = hook.on_dispatch(step, proceed)
        for hook in hooks:
            if hook.due(step, last):
                last = flush_metrics() or last
                last = hook.on_state(step, state, last) or last
                clock = time.perf_counter()
        if last:
            break
    flush_metrics()
    return state


def micro_batches(batches: Iterable[Batch], grad_accum_steps: int, mesh: Mesh) -> Iterator[Batch]:
    """Puts batches on the mesh, with the leading axis of micro-batches that `make_step` expects.

    Args:
        batches: as `Pipeline` yields them, without that axis if `grad_accum_steps` is 1.
        grad_accum_steps: micro-batches per step.
        mesh: the devices.
    """
    for batch in batches:
        micro = batch if grad_accum_steps > 1 else jax.tree.map(lambda leaf: leaf[None], batch)
        yield place_rows(micro, mesh, leading=1)
