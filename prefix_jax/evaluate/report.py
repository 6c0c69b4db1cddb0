"""Evaluation results: metrics as JSON, predictions as JSON lines, and a table for the console."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from prefix_jax.errors import DataError, PrefixJaxError
from prefix_jax.evaluate.metrics import METRICS
from prefix_jax.untrusted.jsonl import read_jsonl

PERCENTAGES = {*METRICS, "f1", "f1_macro", "matthews", "pearson", "spearman"}
"""Metrics that are percentages, of generated text and of tasks with labels."""


def metrics_of(task: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Selects one task's metrics from those of several tasks, which are named "TASK.METRIC"."""
    named = ((name.rpartition("."), value) for name, value in metrics.items())
    return {metric: value for (of, _, metric), value in named if of == task}


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of an evaluation.

    Attributes:
        metrics: values by name: token loss in nats, perplexity, and those in `METRICS`.
        signatures: how each metric was computed, if its library has a signature.
        examples: the number of inputs.
    """

    metrics: Mapping[str, float]
    signatures: Mapping[str, str]
    examples: int

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON. Non-finite values become null, as JSON cannot express them.

        Raises:
            PrefixJaxError: the file cannot be written.
        """
        write_lines(path, [json.dumps(self.as_dict(), indent=2, ensure_ascii=False)])

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        return {
            "metrics": {
                name: value if math.isfinite(value) else None
                for name, value in self.metrics.items()
            },
            "signatures": dict(self.signatures),
            "examples": self.examples,
        }

    @classmethod
    def from_dict(cls, content: Any) -> Report:
        """Reads a report from a JSON object. Null values become NaN.

        Raises:
            ValueError: the content is not a report.
        """
        metrics, signatures, examples = (
            (content if isinstance(content, Mapping) else {}).get(name)
            for name in ("metrics", "signatures", "examples")
        )
        if not isinstance(metrics, Mapping) or not _is_scores(
            {name: math.nan if value is None else value for name, value in metrics.items()}
        ):
            raise ValueError("metrics must map names to numbers or null")
        if not isinstance(signatures, Mapping) or not _is_texts([*signatures.values()]):
            raise ValueError("signatures must map names to texts")
        if type(examples) is not int:
            raise ValueError("examples must be an integer")
        values = {name: math.nan if value is None else value for name, value in metrics.items()}
        return cls(values, signatures, examples)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one input.

    Attributes:
        source: the origin of the input: "test.jsonl:17".
        prompt: the rendered input.
        prediction: the generated text, or the answer.
        references: the correct texts.
        scores: for a task with labels, the probability of each label; for a span, its score and
            the score of "no answer". None for generated text.
    """

    source: str
    prompt: str
    prediction: str
    references: Sequence[str]
    scores: Mapping[str, float] | None = None


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


def make_directory(path: str | Path) -> None:
    """Creates a directory and checks that it is writable, before hours of work.

    Raises:
        PrefixJaxError: the directory cannot be created or written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise PrefixJaxError(f"cannot write to {path}: {error.strerror}") from error


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
    try:
        made = Prediction(**fields)
    except TypeError:
        names = ", ".join(field.name for field in dataclasses.fields(Prediction))
        raise error(
            f"{where}: not a prediction; expected the fields {names} (scores may be left out), got "
            f"{', '.join(sorted(fields))[:200] or 'none'}"
        ) from None
    for name, fits, expected in (
        ("source", isinstance(made.source, str), "a text"),
        ("prompt", isinstance(made.prompt, str), "a text"),
        ("prediction", isinstance(made.prediction, str), "a text"),
        ("references", _is_texts(made.references), "a list of texts"),
        ("scores", made.scores is None or _is_scores(made.scores), "numbers by name, or null"),
    ):
        if not fits:
            value = repr(fields.get(name))
            raise error(f"{where}: the field {name} must be {expected}, got {value[:80]}")
    return made


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_scores(value: Any) -> bool:
    return isinstance(value, dict) and all(
        # An integer with 400 digits does not fit a float.
        isinstance(item, float) or (type(item) is int and abs(item) < 2**63)
        for item in value.values()
    )


def table(columns: Mapping[str, Mapping[str, float]], title: str | None = None) -> Table:
    """Builds a table with one row per metric and one column per set: {"before": …, "after": …}."""
    names = dict.fromkeys(name for values in columns.values() for name in values)
    grid = Table(title=title)
    grid.add_column("metric")
    for column in columns:
        grid.add_column(column, justify="right")
    for name in names:
        grid.add_row(name, *(_cell(name, values.get(name)) for values in columns.values()))
    return grid


def _line(prediction: Prediction) -> str:
    fields = dataclasses.asdict(prediction)
    if prediction.scores is None:
        del fields["scores"]
    return json.dumps(fields, ensure_ascii=False)


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if name in PERCENTAGES else f"{value:.4f}"


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Writes a text file.

    Raises:
        PrefixJaxError: the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise PrefixJaxError(f"cannot write {path}: {error.strerror}") from error
