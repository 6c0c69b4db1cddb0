"""The training loop: steps, evaluations, checkpoints, and a stop at any moment."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from prefix_jax.errors import NonFiniteError
from prefix_jax.evaluate.run import Evaluator, better
from prefix_jax.mesh import describe, place_rows, replicated
from prefix_jax.runs.build import Setup
from prefix_jax.runs.checkpoints import Checkpoints
from prefix_jax.runs.console import Report
from prefix_jax.runs.process_sync import ProcessStatus, ProcessSync
from prefix_jax.runs.profiler import Profiler
from prefix_jax.runs.watchdog import Watchdog
from prefix_jax.train.step import StepMetrics, TrainState


@dataclasses.dataclass
class Progress:
    """How far a run is, besides its state. Checkpoints carry it.

    Attributes:
        best_step: the step whose evaluation was the best so far; None before the first one.
        best_value: its value.
        stale: evaluations since then.
        stopped: whether the run ended before its last step, for want of improvement.
    """

    best_step: int | None = None
    best_value: float | None = None
    stale: int = 0
    stopped: bool = False


class Stop(threading.Event):
    """Asks a run to save and end; of several processes all do, if one of them is asked.

    Attributes:
        cause: the signal that asked, if one did.
    """

    cause: signal.Signals | None = None


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """An event that SIGTERM or Ctrl-C sets, so that the run can save before it ends. A second
    signal acts as usual. Outside of the main thread, where no handler can stand, never set."""
    event = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, _: Any) -> None:
        event.cause = signal.Signals(number)
        event.set()
        signal.signal(number, before[event.cause])

    for number in before:
        signal.signal(number, handle)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    setup: Setup,
    state: TrainState,
    progress: Progress,
    *,
    checkpoints: Checkpoints,
    publish: Callable[[], None],
    report: Report,
    evaluator: Evaluator,
    metadata: dict[str, Any],
    stop: Stop,
    watch: Watchdog,
    profile: Profiler,
) -> TrainState:
    """Runs the steps that are left.

    Args:
        setup: of the run.
        state: where to start from; consumed.
        progress: belongs to `state`; updated in place.
        checkpoints: where states are saved.
        publish: brings what was recorded to where the checkpoints are; called before each.
        report: what is shown and recorded.
        evaluator: of the dev split.
        metadata: what every checkpoint says about the run.
        stop: set it to save and return after the step at hand; of several processes, the next.
        watch: is told how long steps take.
        profile: traces some of them.

    Returns:
        The state after the last step that was run.

    Raises:
        NonFiniteError: the loss or its gradient is not finite; the message names the batch. The
            state before that step has been saved.
        CheckpointError: a checkpoint could not be written.
    """
    config, train_config = setup.config, setup.config.train
    metric = config.evaluate.metrics[0]
    lift = jax.jit(setup.model.prefix)
    done = int(state.step)
    batches = setup.pipeline.iterate(done, setup.steps)
    proceed = jax.device_put(np.bool_(True), replicated(setup.mesh))
    pending: tuple[int, StepMetrics] | None = None
    together, told, busy = ProcessSync(stop), ProcessStatus(False, []), 0.0
    clock = time.perf_counter()

    def save(step: int) -> None:
        content = {**metadata, "mesh": describe(setup.mesh), "progress": vars(progress).copy()}
        publish()
        checkpoints.save(step, state, content, best=progress.best_step)

    def flush_metrics() -> None:
        """Waits for the metrics of the pending step, and records them."""
        nonlocal pending, told, clock
        if pending is None:
            return
        step, metrics = pending
        pending = None
        values = {name: float(value) for name, value in vars(jax.device_get(metrics)).items()}
        now = time.perf_counter()
        if not values.pop("finite"):
            save(step - 1)
            checkpoints.wait()
            sources = ", ".join(dict.fromkeys(setup.pipeline.batch_sources(step - 1)))
            advice = (
                "no step before it has changed anything, so the cause is in the model's weights or "
                "config.json, in model.dtype, in init, or in these examples; a lower learning "
                "rate will not help"
                if step == 1
                else "the steps before it were finite, so training diverged, or these examples "
                "are extreme; lower optim.learning_rate and start again in another output"
            )
            raise NonFiniteError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; "
                f"its batch holds {sources}. The state before it is saved; {advice}"
            )
        values["learning_rate"] = float(setup.schedule(step - 1))
        report.step(step, values, now - clock)
        told = together.collect()
        # The time covers the batch that this process has just read, for the step after.
        spent = [*told.busy]
        spent[jax.process_index()] = max(spent[jax.process_index()], busy)
        watch.step(step, now - clock, spent)
        clock = now

    def evaluate(step: int) -> bool:
        """Measures the dev split; True if it is the best so far."""
        params = setup.params(state)
        with jax.set_mesh(setup.mesh):
            prefix = lift(params)
        dev = setup.splits["dev"]
        found = evaluator(params["backbone"], prefix, dev, [metric], params.get("head"))
        report.evaluation(step, found.report.metrics)
        improved = better(metric, found.report.metrics[metric], progress.best_value)
        if improved:
            progress.best_step, progress.best_value = step, found.report.metrics[metric]
        progress.stale = 0 if improved else progress.stale + 1
        return improved

    while done < setup.steps and not progress.stopped:
        begun = time.perf_counter()
        with watch.doing(f"reading the batch of step {done + 1}"):
            micro = next(batches)
            if config.optim.grad_accum_steps == 1:
                micro = jax.tree.map(lambda leaf: leaf[None], micro)
            placed = place_rows(micro, setup.mesh, leading=1)
        busy = time.perf_counter() - begun
        with jax.set_mesh(setup.mesh), jax.profiler.StepTraceAnnotation("train", step_num=done):
            state, metrics = setup.step(state, setup.frozen, placed, proceed)
        done += 1
        # The metrics of the step before: this one is running already.
        flush_metrics()
        pending = (done, metrics)
        proceed = together.post(busy, metrics.finite)

        last = done == setup.steps or told.stop
        every = train_config.eval_every
        must_evaluate = "dev" in setup.splits and (
            done == setup.steps or (every is not None and done % every == 0)
        )
        must_save = done % train_config.checkpoint_every == 0
        must_turn = profile.at(done)
        if not (must_evaluate or must_save or must_turn or last):
            continue
        flush_metrics()
        if must_turn or last:
            profile.turn(last)
        if must_evaluate:
            with watch.doing("evaluating"):
                must_save |= evaluate(done)
            proceed = together.post(0.0, proceed)
            last |= together.collect().stop
            if train_config.patience is not None and progress.stale >= train_config.patience:
                progress.stopped = last = True
                report.message(
                    f"stopped early: {metric} on dev has not improved for "
                    f"{progress.stale} evaluations (best at step {progress.best_step})"
                )
        if must_save or last:
            with watch.doing(f"saving step {done}"):
                save(done)
        watch.heartbeat()
        clock = time.perf_counter()
        if last:
            break
    with watch.doing("writing the last checkpoint"):
        checkpoints.wait()
    return state
