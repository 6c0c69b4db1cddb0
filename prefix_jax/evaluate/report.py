"""What an evaluation leaves behind: results as JSON, predictions as JSON lines, a table to read."""

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
"""The metrics of text, and of answers with labels."""


def metrics_of(task: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of one task out of those of several, which are named "TASK.METRIC"."""
    named = ((name.rpartition("."), value) for name, value in metrics.items())
    return {metric: value for (of, _, metric), value in named if of == task}


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of an evaluation.

    Attributes:
        metrics: values by name: token loss in nats, perplexity, and those of `METRICS`.
        signatures: how each was computed, where its library says so.
        examples: the number of inputs.
    """

    metrics: Mapping[str, float]
    signatures: Mapping[str, str]
    examples: int

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON. What is not finite becomes null: JSON has no word for it.

        Raises:
            PrefixJaxError: the file cannot be written.
        """
        write_lines(path, [json.dumps(self.as_dict(), indent=2, ensure_ascii=False)])

    def as_dict(self) -> dict[str, Any]:
        """The content of its JSON."""
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
        """From the content of its JSON. What was not finite is NaN.

        Raises:
            ValueError: the content is not that of a report.
        """
        metrics, signatures, examples = (
            (content if isinstance(content, Mapping) else {}).get(name)
            for name in ("metrics", "signatures", "examples")
        )
        if not isinstance(metrics, Mapping) or not _is_scores(
            {name: math.nan if value is None else value for name, value in metrics.items()}
        ):
            raise ValueError("metrics must be numbers or null by name")
        if not isinstance(signatures, Mapping) or not _is_texts([*signatures.values()]):
            raise ValueError("signatures must be texts by name")
        if type(examples) is not int:
            raise ValueError("examples must be a number")
        values = {name: math.nan if value is None else value for name, value in metrics.items()}
        return cls(values, signatures, examples)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What was generated for one input.

    Attributes:
        source: where the input came from: "test.jsonl:17".
        prompt: the input as the model read it.
        prediction: what the model wrote.
        references: what it should have written.
        scores: of an answer with labels, the probability of each; of a span, its score and that of
            there being none. None where text was generated.
    """

    source: str
    prompt: str
    prediction: str
    references: Sequence[str]
    scores: Mapping[str, float] | None = None


def save_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Writes one JSON record a line, with the fields of `Prediction`.

    Raises:
        PrefixJaxError: the file cannot be written.
    """
    with writing_predictions(path) as write:
        for prediction in predictions:
            write(prediction)


@contextlib.contextmanager
def writing_predictions(path: str | Path) -> Iterator[Callable[[Prediction], None]]:
    """Yields a function that appends a prediction to `path` + ".unfinished", where it can be read
    at once. The file gets its name when all of them are written. A pipe or a device (/dev/stdout)
    is written to as it is.

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
    """Makes sure that results can be written to a directory, before they take hours.

    Raises:
        PrefixJaxError: they cannot.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise PrefixJaxError(f"cannot write to {path}: {error.strerror}") from error


def read_predictions(path: str | Path, error: type[PrefixJaxError] = DataError) -> list[Prediction]:
    """Reads what `save_predictions` wrote.

    Args:
        path: of the file.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if the file is missing, unreadable, or holds anything but
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
        # An integer of 400 digits is no float.
        isinstance(item, float) or (type(item) is int and abs(item) < 2**63)
        for item in value.values()
    )


def table(columns: Mapping[str, Mapping[str, float]], title: str | None = None) -> Table:
    """Metrics as rows, and a column for each set of them: {"before": …, "after": …}."""
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
        PrefixJaxError: it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise PrefixJaxError(f"cannot write {path}: {error.strerror}") from error
