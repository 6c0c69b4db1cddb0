"""Reads and writes the results of a run: `results.json` and `predictions*.jsonl`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from prefix_jax import config as configs
from prefix_jax.config import Config
from prefix_jax.errors import CheckpointError, PrefixJaxError
from prefix_jax.evaluate.evaluator import Evaluation
from prefix_jax.evaluate.predictions import read_predictions, save_predictions
from prefix_jax.evaluate.report import Report
from prefix_jax.untrusted.json import read_json_object
from prefix_jax.untrusted.paths import explain

_NAMES = {"before", "after"}


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of a finished run.

    Attributes:
        step: the step whose prefix was measured.
        evaluations: on the test split: "after" training, and "before" if requested.
    """

    step: int
    evaluations: Mapping[str, Evaluation]


def config_digest(config: Config) -> str:
    """Identifies the config of a run, without its output directory, which may be moved."""
    return hashlib.sha256(
        configs.dump(dataclasses.replace(config, output_dir="")).encode()
    ).hexdigest()


def save_results(directory: Path, digest: str, results: Results) -> None:
    """Writes results into a run directory, which completes the run.

    Args:
        directory: the run directory.
        digest: identifies the config, see `config_digest`.
        results: the results.

    Raises:
        PrefixJaxError: they cannot be written.
    """
    for name, evaluation in results.evaluations.items():
        path = _predictions(directory, name)
        if evaluation.predictions:
            save_predictions(path, evaluation.predictions)
        else:
            path.unlink(missing_ok=True)
    content = {
        "step": results.step,
        "test": {name: e.report.as_dict() for name, e in results.evaluations.items()},
        "config": digest,
    }
    write_atomically(directory / "results.json", json.dumps(content, indent=2) + "\n")


def read_results(directory: Path, digest: str) -> Results | None:
    """Reads the results of a run; None if it has not finished, or had another config.

    Args:
        directory: the run directory.
        digest: identifies the config, see `config_digest`.

    Raises:
        CheckpointError: the files cannot be read, or are damaged.
    """
    path = directory / "results.json"
    if not os.path.lexists(path):
        return None
    try:
        content = read_json_object(path, PrefixJaxError)
        if content.get("config") != digest:
            if "config" not in content:
                raise PrefixJaxError("it has no key 'config'")
            return None
        step, test = content.get("step"), content.get("test")
        if type(step) is not int or not isinstance(test, dict) or not test.keys() <= _NAMES:
            raise PrefixJaxError(
                "expected the keys step, an integer, and test, with after and before"
            )
        evaluations = {}
        for name, report in test.items():
            stored = _predictions(directory, name)
            predictions = (
                read_predictions(stored, PrefixJaxError) if os.path.lexists(stored) else []
            )
            evaluations[name] = Evaluation(Report.from_dict(report), predictions)
        return Results(step, evaluations)
    except (PrefixJaxError, ValueError) as error:
        remedy = "remove it to measure again"
        if isinstance(error.__cause__, OSError):
            remedy = "give this user permission to read it, or choose another output_dir"
        why = str(error).removeprefix(f"{path}: ").removeprefix("cannot be read ")
        raise CheckpointError(f"{path} cannot be read ({why.strip('()')}); {remedy}") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file completely or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {explain(error)}") from error


def _predictions(directory: Path, name: str) -> Path:
    return directory / ("predictions.jsonl" if name == "after" else f"predictions-{name}.jsonl")
