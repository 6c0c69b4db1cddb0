"""Predictions in the order of their records, as a list, to a listener and to a file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prefix_jax.data.source import Record
from prefix_jax.decode.continuation import Generation
from prefix_jax.evaluate.predictions import writing_predictions
from prefix_jax.tasks import Prediction
from prefix_jax.tasks.base import Prompt

Emit = Callable[[Prediction], None]


@contextlib.contextmanager
def collecting(
    output: str | Path | None, on_prediction: Emit | None
) -> Iterator[tuple[list[Prediction], Emit]]:
    """Yields a list, and a function that adds a prediction to it, calls `on_prediction`, and
    writes the prediction to a file.

    Raises:
        PrefixJaxError: the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        # Opened first, so that a file that cannot be written is reported before the work.
        listeners = [] if on_prediction is None else [on_prediction]
        if output is not None:
            listeners.append(stack.enter_context(writing_predictions(output)))
        predictions: list[Prediction] = []

        def emit(prediction: Prediction) -> None:
            predictions.append(prediction)
            for listener in listeners:
                listener(prediction)

        yield predictions, emit


def in_order(
    records: Sequence[Record], prompts: Sequence[Prompt], emit: Emit
) -> Callable[[int, Generation], None]:
    """Returns a function that receives the index and the generation of each record, in any order,
    and emits the predictions in the order of the records."""
    waiting: dict[int, Generation] = {}
    done = 0

    def on_done(index: int, generation: Generation) -> None:
        nonlocal done
        waiting[index] = generation
        while done in waiting:
            for sample in waiting.pop(done).samples:
                origin, prompt = records[done].origin, prompts[done].text
                emit(Prediction(origin, prompt, sample.text.strip(), ()))
            done += 1

    return on_done
