"""The loop runs one step ahead of its metrics, and calls its hooks in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.errors import NonFiniteError
from prefix_jax.mesh import make_mesh
from prefix_jax.train.loop import Hook, train
from prefix_jax.train.program import Program
from prefix_jax.train.step import StepMetrics, TrainState

MESH = make_mesh(1, 1, 1, jax.devices()[:1])


class Recorder(Hook):
    """Records its events, and stops the training at some of them."""

    def __init__(self, due: tuple[int, ...] = (), stop: tuple[str, int] = ("", 0)) -> None:
        self.events: list[tuple[Any, ...]] = []
        self._due, self._stop = due, stop

    def on_dispatch(self, step: int, proceed: jax.Array) -> jax.Array:
        self.events.append(("dispatched", step))
        return proceed

    def on_metrics(self, step: int, metrics: Mapping[str, float], seconds: float) -> bool:
        assert seconds > 0
        self.events.append(("metrics", step, metrics["loss"], metrics["learning_rate"]))
        return self._stop == ("metrics", step)

    def on_nonfinite(self, step: int, metrics: Mapping[str, float], state: TrainState) -> None:
        self.events.append(("nonfinite", step, int(state.step), float(state.train)))

    def due(self, step: int, last: bool) -> bool:
        return last or step in self._due

    def on_state(self, step: int, state: TrainState, last: bool) -> bool:
        self.events.append(("state", step, float(state.train), last))
        return self._stop == ("state", step)


def run(hook: Hook, steps: int = 4, start: int = 0, batches: Mapping[int, float] = {}) -> Any:
    """Trains a sum: each batch is a number that is added to the state, by default 1."""

    def step(state: TrainState, frozen: Any, batch: Any, proceed: Any) -> Any:
        finite = proceed & jnp.isfinite(batch)
        new = TrainState(state.step + 1, state.train + batch, state.optimizer)
        zero = jnp.zeros(())
        metrics = StepMetrics(batch, zero, zero, zero, zero, finite)
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state), metrics

    def numbers() -> Iterator[Any]:
        for number in range(start + 1, steps + 1):
            yield jnp.float32(batches.get(number, 1.0))

    state = TrainState(jnp.int32(start), jnp.float32(start), ())
    program = Program(jax.jit(step, donate_argnums=0), state, None, lambda step: step / 10, steps)
    return train(program, state, numbers(), [hook], mesh=MESH)


def test_dispatches_a_step_before_reading_the_metrics_of_the_previous_one() -> None:
    events: list[tuple[Any, ...]] = []

    reads = jax.device_get

    def device_get(metrics: StepMetrics) -> Any:
        events.append(("read", int(reads(metrics.loss))))
        return reads(metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_get", device_get)
        recorder = Recorder()
        recorder.events = events
        run(recorder, steps=3, batches={1: 1.0, 2: 2.0, 3: 3.0})
    order = [event[:2] for event in events]
    assert order == [
        ("dispatched", 1),
        ("read", 1),  # step 2 was dispatched: its hooks are called next
        ("metrics", 1),
        ("dispatched", 2),
        ("read", 2),
        ("metrics", 2),
        ("dispatched", 3),
        ("read", 3),
        ("metrics", 3),
        ("state", 3),
    ]


def test_passes_the_state_after_a_step_once_its_metrics_are_known() -> None:
    recorder = Recorder(due=(2,))
    state = run(recorder)
    assert float(state.train) == 4.0
    assert [event for event in recorder.events if event[0] != "dispatched"] == [
        ("metrics", 1, 1.0, 0.0),
        ("metrics", 2, 1.0, 0.1),
        ("state", 2, 2.0, False),
        ("metrics", 3, 1.0, 0.2),
        ("metrics", 4, 1.0, pytest.approx(0.3)),
        ("state", 4, 4.0, True),
    ]


def test_continues_from_the_step_of_the_state() -> None:
    recorder = Recorder()
    assert int(run(recorder, start=2).step) == 4
    assert [event[1] for event in recorder.events if event[0] == "dispatched"] == [3, 4]
    assert int(run(Recorder(), start=4).step) == 4


def test_a_hook_stops_after_the_step_that_runs_already() -> None:
    recorder = Recorder(stop=("metrics", 1))
    assert int(run(recorder).step) == 2
    assert recorder.events[-1] == ("state", 2, 2.0, True)


def test_a_hook_stops_after_the_state_that_it_received() -> None:
    recorder = Recorder(due=(3,), stop=("state", 3))
    assert int(run(recorder).step) == 3


@pytest.mark.parametrize("due", [(), (2,)], ids=["one step ahead", "not ahead"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nonfinite_loss_stops_in_the_state_before_it(bad: float, due: tuple[int, ...]) -> None:
    recorder = Recorder(due)
    with pytest.raises(NonFiniteError, match=r"step 2: loss (nan|inf), gradient norm 0\.0"):
        run(recorder, batches={2: bad})
    assert recorder.events[-1] == ("nonfinite", 2, 1, 1.0)


def test_trains_without_hooks() -> None:
    class Nothing(Hook):
        pass

    assert float(run(Nothing()).train) == 4.0
