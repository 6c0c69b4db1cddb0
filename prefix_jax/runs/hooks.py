"""Hooks that evaluate, save checkpoints and explain a loss that is not finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from prefix_jax.errors import NonFiniteError
from prefix_jax.evaluate.evaluator import better
from prefix_jax.runs.checkpoints import Checkpoints
from prefix_jax.runs.metric_writer import Kind
from prefix_jax.runs.watchdog import Watchdog
from prefix_jax.train.loop import Hook
from prefix_jax.train.step import TrainState


@dataclasses.dataclass
class Progress:
    """Progress of early stopping, stored in checkpoints with the state.

    Attributes:
        best_step: the step with the best evaluation so far; None before the first one.
        best_value: the value of its metric.
        stale: evaluations since then.
        stopped: whether the run stopped early, for lack of improvement.
    """

    best_step: int | None = None
    best_value: float | None = None
    stale: int = 0
    stopped: bool = False


class Writer(Protocol):
    """Receives metrics: `MetricWriter` and `Console`."""

    def write(self, step: int, kind: Kind, values: Mapping[str, float]) -> None: ...


class EvaluationHook(Hook):
    """Evaluates on the dev split, tracks the best step, and stops if there is no improvement.

    Args:
        measure: returns the metrics of a state, by name.
        metric: the metric that selects the best step.
        every: steps between evaluations; None for the last step only.
        steps: the steps of the whole run.
        patience: evaluations without improvement before the run stops; None never stops it.
        progress: updated in place.
        writers: receive the metrics.
        stop_requested: returns whether the run was asked to stop during the evaluation.
        watchdog: names the evaluation as the current activity.
        message: receives a line if the run stops early.
    """

    def __init__(
        self,
        measure: Callable[[TrainState], Mapping[str, float]],
        metric: str,
        *,
        every: int | None,
        steps: int,
        patience: int | None,
        progress: Progress,
        writers: Sequence[Writer],
        stop_requested: Callable[[], bool],
        watchdog: Watchdog,
        message: Callable[[str], None],
    ) -> None:
        self._measure, self._metric = measure, metric
        self._every, self._steps, self._patience = every, steps, patience
        self._progress, self._writers = progress, writers
        self._stop_requested, self._watchdog, self._message = stop_requested, watchdog, message

    def due(self, step: int, last: bool) -> bool:
        return step == self._steps or (self._every is not None and step % self._every == 0)

    def on_state(self, step: int, state: TrainState, last: bool) -> bool:
        with self._watchdog.doing("evaluating"):
            metrics = self._measure(state)
        for writer in self._writers:
            writer.write(step, "dev", metrics)
        self._update(step, metrics[self._metric])
        if self._progress.stopped:
            self._message(
                f"stopped early: {self._metric} on dev has not improved for "
                f"{self._progress.stale} evaluations (best at step {self._progress.best_step})"
            )
        # Every process must ask, whether or not the run stops early.
        return self._stop_requested() or self._progress.stopped

    def _update(self, step: int, value: float) -> None:
        progress = self._progress
        if better(self._metric, value, progress.best_value):
            progress.best_step, progress.best_value, progress.stale = step, value, 0
        else:
            progress.stale += 1
        progress.stopped = self._patience is not None and progress.stale >= self._patience


class CheckpointHook(Hook):
    """Saves the state regularly, at the best step, at the last step, and before a failed step.

    Args:
        checkpoints: where states are saved.
        every: steps between checkpoints.
        progress: stored in every checkpoint.
        metadata: stored in every checkpoint.
        publish: copies metrics and other files to the output; called before each save.
        watchdog: names the save as the current activity.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        every: int,
        progress: Progress,
        metadata: Mapping[str, Any],
        publish: Callable[[], None],
        watchdog: Watchdog,
    ) -> None:
        self._checkpoints, self._every = checkpoints, every
        self._progress, self._metadata = progress, metadata
        self._publish, self._watchdog = publish, watchdog

    def due(self, step: int, last: bool) -> bool:
        return last or step % self._every == 0 or step == self._progress.best_step

    def on_state(self, step: int, state: TrainState, last: bool) -> bool:
        with self._watchdog.doing(f"saving step {step}"):
            self._save(step, state)
        if last:
            with self._watchdog.doing("writing the last checkpoint"):
                self._checkpoints.wait()
        return False

    def on_nonfinite(self, step: int, metrics: Mapping[str, float], state: TrainState) -> None:
        self._save(step - 1, state)
        self._checkpoints.wait()

    def _save(self, step: int, state: TrainState) -> None:
        self._publish()
        metadata = {**self._metadata, "progress": dataclasses.asdict(self._progress)}
        self._checkpoints.save(step, state, metadata, best=self._progress.best_step)


class NonFiniteHook(Hook):
    """Explains a loss that is not finite. Comes after `CheckpointHook`, which saves the state.

    Args:
        origins: returns where the examples of a step, counted from 0, come from.
    """

    def __init__(self, origins: Callable[[int], Sequence[str]]) -> None:
        self._origins = origins

    def on_nonfinite(self, step: int, metrics: Mapping[str, float], state: TrainState) -> None:
        examples = ", ".join(dict.fromkeys(self._origins(step - 1)))
        advice = (
            "nothing was trained before it, so the cause is in the model's weights or "
            "config.json, in model.dtype, in init, or in these examples; a lower learning "
            "rate will not help"
            if step == 1
            else "the steps before it were finite, so training diverged, or these examples "
            "are extreme; lower optim.learning_rate and start again with another output_dir"
        )
        raise NonFiniteError(
            f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; "
            f"its batch contains {examples}. The state before it was saved; {advice}"
        )
