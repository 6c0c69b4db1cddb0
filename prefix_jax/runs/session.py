"""Trains a run: opens its checkpoints, metrics and console, and connects them to the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

from prefix_jax.config import TrainConfig
from prefix_jax.mesh import describe
from prefix_jax.runs.build import Run
from prefix_jax.runs.checkpoints import Checkpoints
from prefix_jax.runs.console import Console
from prefix_jax.runs.hooks import CheckpointHook, EvaluationHook, NonFiniteHook, Progress
from prefix_jax.runs.metric_writer import MetricWriter
from prefix_jax.runs.process_sync import ProcessSync, host_names
from prefix_jax.runs.profiler import Profiler
from prefix_jax.runs.resume import Identity, resume
from prefix_jax.runs.run_directory import RunDirectory
from prefix_jax.runs.signals import stop_on_signal
from prefix_jax.runs.watchdog import Watchdog, WatchedBatches
from prefix_jax.terminal import print_warning
from prefix_jax.train.loop import Hook, micro_batches, train
from prefix_jax.train.step import TrainState


@dataclasses.dataclass
class Session:
    """A run in progress.

    Attributes:
        run: what trains.
        output: the run directory.
        checkpoints: the checkpoints in it.
        console: shows progress.
        writers: receive metrics: the console and, on the first process, the metric writer.
        identity: stored in checkpoints.
        state: the current state.
        progress: the best step so far.
    """

    run: Run
    output: RunDirectory
    checkpoints: Checkpoints
    console: Console
    writers: Sequence[MetricWriter | Console]
    identity: Identity
    state: TrainState
    progress: Progress


@contextlib.contextmanager
def open_session(
    run: Run, output: RunDirectory, console: Console, config: TrainConfig
) -> Iterator[Session]:
    """Restores the latest state, opens the files of a run and shows its progress.

    Whatever was recorded is copied to the output when the session closes, even after an error.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(output.publish)
        checkpoints = stack.enter_context(
            Checkpoints(
                output.checkpoints, config.keep_checkpoints, console.warning, run.program.steps
            )
        )
        identity = Identity.of(run.pretrained.fingerprint, run.splits["train"])
        state, progress = resume(checkpoints, run.program.state, identity)
        step = int(state.step)
        writers: list[MetricWriter | Console] = [console]
        if jax.process_index() == 0:
            # Before the console: a step is recorded before it is shown.
            writers.insert(0, stack.enter_context(MetricWriter(output.directory, step)))
        stack.enter_context(console.training(run.program.steps, step, config.log_every))
        for warning in run.warnings:
            console.warning(warning)
        for line in run.summary:
            console.message(line)
        if step:
            console.message(f"resuming after step {step}")
        yield Session(run, output, checkpoints, console, writers, identity, state, progress)


def train_session(session: Session, config: TrainConfig, metric: str) -> signal.Signals | None:
    """Trains the steps that remain.

    Args:
        session: its state and progress are updated.
        config: the intervals of evaluations, checkpoints and traces.
        metric: the metric on the dev split that selects the best step.

    Returns:
        The signal that interrupted the run, which saved its state; None if it is complete.
    """
    run, progress, console = session.run, session.progress, session.console
    start, steps = int(session.state.step), run.program.steps
    if progress.stopped:
        return None
    # A stalled process must report it itself.
    warn = console.warning if jax.process_index() == 0 else print_warning
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signal())
        sync = ProcessSync(stop, busy=lambda: batches.seconds)
        watchdog = Watchdog(warn, host_names(), jax.process_index(), busy=sync.busy)
        profiler = Profiler(session.output.directory / "profile", start, config.profile_steps)
        # In this order: record a step before anything can stop the run, and save it last.
        hooks: list[Hook] = [*session.writers, sync, watchdog, profiler]
        if "dev" in run.splits:
            hooks.append(
                EvaluationHook(
                    _dev_metrics(run, metric),
                    metric,
                    every=config.eval_every,
                    steps=steps,
                    patience=config.patience,
                    progress=progress,
                    writers=session.writers,
                    stop_requested=sync.stop_requested,
                    watchdog=watchdog,
                    message=console.message,
                )
            )
        saving = CheckpointHook(
            session.checkpoints,
            every=config.checkpoint_every,
            progress=progress,
            metadata={**dataclasses.asdict(session.identity), "mesh": describe(run.mesh)},
            publish=session.output.publish,
            watchdog=watchdog,
        )
        hooks += [saving, NonFiniteHook(run.pipeline.batch_origins)]
        micro = micro_batches(
            run.pipeline.iterate(start, steps), run.pipeline.packing.grad_accum_steps, run.mesh
        )
        batches = WatchedBatches(micro, watchdog, start + 1)
        stack.enter_context(watchdog)
        stack.enter_context(profiler)
        session.state = train(run.program, session.state, batches, hooks, mesh=run.mesh)
    step = int(session.state.step)
    if step == steps or progress.stopped:
        return None
    console.message(f"interrupted after step {step}, which is saved; run the same command again")
    # The signal may have reached another process.
    return stop.signal or signal.SIGTERM


def _dev_metrics(run: Run, metric: str) -> Callable[[TrainState], Mapping[str, float]]:
    """Returns a function that measures a state on the dev split."""
    lift = jax.jit(run.model.prefix)

    def measure(state: TrainState) -> Mapping[str, float]:
        params = run.program.params(state)
        with jax.set_mesh(run.mesh):
            prefix = lift(params)
        evaluation = run.evaluator(
            params["backbone"], prefix, run.splits["dev"], [metric], params.get("head")
        )
        return evaluation.report.metrics

    return measure
