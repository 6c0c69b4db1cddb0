"""Hooks that evaluate, save checkpoints and explain a nonfinite loss."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import pytest

from prefix_jax.errors import NonFiniteError
from prefix_jax.runs.hooks import CheckpointHook, EvaluationHook, NonFiniteHook, Progress
from prefix_jax.runs.process_sync import ProcessSync
from prefix_jax.runs.watchdog import Watchdog
from prefix_jax.train.step import TrainState

STATE: Any = TrainState(jnp.int32(0), None, ())


class Calls:
    """Records calls of a writer and of checkpoints, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        self.calls.append((kind, step, values["loss"]))

    def publish(self) -> None:
        self.calls.append(("publish",))

    def save(self, step: int, state: TrainState, metadata: Mapping[str, Any], best: Any) -> None:
        self.calls.append(("save", step, metadata["progress"]["best_step"], best))

    def wait(self) -> None:
        self.calls.append(("wait",))


@pytest.fixture
def calls() -> Calls:
    return Calls()


def evaluation(
    calls: Calls, losses: list[float], stop: threading.Event | None = None, **options: Any
) -> EvaluationHook:
    values: Iterator[float] = iter(losses)
    settings = {"every": 2, "steps": 9, "patience": None, "progress": Progress()} | options
    return EvaluationHook(
        lambda _: {"loss": next(values)},
        "loss",
        **settings,
        writers=[calls],
        stop_requested=ProcessSync(stop or threading.Event()).stop_requested,
        watchdog=Watchdog(pytest.fail, ["host"]),
        message=lambda text: calls.calls.append(("message", text)),
    )


def test_evaluates_regularly_and_at_the_last_step(calls: Calls) -> None:
    hook = evaluation(calls, [])
    assert [step for step in range(1, 10) if hook.due(step, last=False)] == [2, 4, 6, 8, 9]
    hook = evaluation(calls, [], every=None)
    assert [step for step in range(1, 10) if hook.due(step, last=False)] == [9]
    # A run that stops early is evaluated when it has been resumed.
    assert not hook.due(5, last=True)


def test_tracks_the_best_step_and_stops_for_lack_of_improvement(calls: Calls) -> None:
    progress = Progress()
    hook = evaluation(calls, [3.0, 2.0, 2.5, 2.0], patience=2, progress=progress)
    assert [hook.on_state(step, STATE, False) for step in (2, 4, 6, 8)] == [False] * 3 + [True]
    assert progress == Progress(best_step=4, best_value=2.0, stale=2, stopped=True)
    assert calls.calls[:2] == [("dev", 2, 3.0), ("dev", 4, 2.0)]
    assert calls.calls[-1][1].startswith("stopped early: loss on dev has not improved for 2")


def test_stops_if_a_signal_arrives_during_an_evaluation(calls: Calls) -> None:
    stop = threading.Event()
    hook = evaluation(calls, [3.0, 2.0], stop)
    assert not hook.on_state(2, STATE, False)
    stop.set()
    assert hook.on_state(4, STATE, False)


def checkpointing(calls: Calls, progress: Progress) -> CheckpointHook:
    return CheckpointHook(
        calls,  # type: ignore[arg-type]
        every=5,
        progress=progress,
        metadata={"mesh": "data=1"},
        publish=calls.publish,
        watchdog=Watchdog(pytest.fail, ["host"]),
    )


def test_saves_regularly_at_the_best_and_at_the_last_step(calls: Calls) -> None:
    hook = checkpointing(calls, Progress(best_step=7))
    assert [step for step in range(1, 13) if hook.due(step, last=step == 12)] == [5, 7, 10, 12]
    hook.on_state(10, STATE, last=False)
    assert calls.calls == [("publish",), ("save", 10, 7, 7)]
    hook.on_state(12, STATE, last=True)
    assert calls.calls[2:] == [("publish",), ("save", 12, 7, 7), ("wait",)]


def test_saves_the_state_before_a_nonfinite_loss_and_names_its_examples(calls: Calls) -> None:
    metrics = {"loss": float("nan"), "grad_norm": 1.0}
    checkpointing(calls, Progress()).on_nonfinite(4, metrics, STATE)
    assert calls.calls == [("publish",), ("save", 3, None, None), ("wait",)]
    hook = NonFiniteHook(lambda step: [f"record {step}", "record 9", "record 9"])
    with pytest.raises(NonFiniteError, match=r"step 4: loss nan.* contains record 3, record 9\."):
        hook.on_nonfinite(4, metrics, STATE)
    with pytest.raises(NonFiniteError, match="a lower learning rate will not help"):
        hook.on_nonfinite(1, metrics, STATE)
