"""Evaluation results as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefix_jax.errors import PrefixJaxError
from prefix_jax.tasks import TASKS

PERCENTAGES = {name for task in TASKS.values() for name in task().metrics} - {"loss"}
"""Metrics that are percentages."""


def metrics_of(dataset: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Selects one dataset's metrics from those of a mixture, which are named "DATASET.METRIC"."""
    named = ((name.rpartition("."), value) for name, value in metrics.items())
    return {metric: value for (owner, _, metric), value in named if owner == dataset}


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of an evaluation.

    Attributes:
        metrics: values by name: token loss in nats, perplexity, and those of the task.
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
        if not isinstance(metrics, Mapping) or not is_scores(
            {name: math.nan if value is None else value for name, value in metrics.items()}
        ):
            raise ValueError("metrics must map names to numbers or null")
        if not isinstance(signatures, Mapping) or not is_texts([*signatures.values()]):
            raise ValueError("signatures must map names to texts")
        if type(examples) is not int:
            raise ValueError("examples must be an integer")
        values = {name: math.nan if value is None else value for name, value in metrics.items()}
        return cls(values, signatures, examples)


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


def is_texts(value: Any) -> bool:
    """Returns whether a JSON value is a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def is_scores(value: Any) -> bool:
    """Returns whether a JSON value maps names to numbers that fit a float."""
    return isinstance(value, dict) and all(
        # An integer with 400 digits does not fit a float.
        isinstance(item, float) or (type(item) is int and abs(item) < 2**63)
        for item in value.values()
    )


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
