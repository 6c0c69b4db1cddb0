"""Predictions as JSON lines."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefix_jax.errors import DataError, PrefixJaxError
from prefix_jax.evaluate.report import is_scores, is_texts
from prefix_jax.tasks import Prediction
from prefix_jax.untrusted.jsonl import read_jsonl

# The stored fields of a prediction.
STORED = ("origin", "prompt", "prediction", "references", "scores")
_REQUIRED = {"origin", "prompt", "prediction", "references"}


def save_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Writes one JSON record per line, with the fields of `Prediction`.

    Raises:
        PrefixJaxError: the file cannot be written.
    """
    with writing_predictions(path) as write:
        for prediction in predictions:
            write(prediction)


@contextlib.contextmanager
def writing_predictions(path: str | Path) -> Iterator[Callable[[Prediction], None]]:
    """Yields a function that appends a prediction to `path` + ".unfinished".

    Each prediction can be read there at once. The file is renamed to `path` when all are written. A
    pipe or a device (/dev/stdout) is written directly.

    Raises:
        PrefixJaxError: the file cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    if path.exists() and not path.is_file() and not path.is_dir():
        unfinished = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8", newline="\n", buffering=1) as file:
            yield lambda prediction: print(_line(prediction), file=file)
        if unfinished != path:
            unfinished.replace(path)
    except OSError as error:
        raise PrefixJaxError(f"cannot write {path}: {error.strerror}") from error


def read_predictions(path: str | Path, error: type[PrefixJaxError] = DataError) -> list[Prediction]:
    """Reads a file written by `save_predictions`.

    Args:
        path: the file.
        error: the exception class to raise.

    Raises:
        PrefixJaxError: an `error`, if the file is missing, unreadable, or contains anything but
            predictions.
    """
    return [_prediction(fields, f"{path}:{n}", error) for n, fields in read_jsonl(path, error)]


def _prediction(fields: Mapping[str, Any], where: str, error: type[PrefixJaxError]) -> Prediction:
    if not _REQUIRED <= fields.keys() <= {*STORED}:
        raise error(
            f"{where}: not a prediction; expected the fields {', '.join(STORED)} (scores may be "
            f"left out), got {', '.join(sorted(fields))[:200] or 'none'}"
        )
    prediction = Prediction(**fields)
    scores = prediction.scores
    for name, fits, expected in (
        ("origin", isinstance(prediction.origin, str), "a text"),
        ("prompt", isinstance(prediction.prompt, str), "a text"),
        ("prediction", isinstance(prediction.prediction, str), "a text"),
        ("references", is_texts(prediction.references), "a list of texts"),
        ("scores", scores is None or is_scores(scores), "numbers by name, or null"),
    ):
        if not fits:
            value = repr(fields.get(name))
            raise error(f"{where}: the field {name} must be {expected}, got {value[:80]}")
    return prediction


def _line(prediction: Prediction) -> str:
    fields = {name: getattr(prediction, name) for name in STORED}
    if prediction.scores is None:
        del fields["scores"]
    return json.dumps(fields, ensure_ascii=False)
