"""What a run measured at its end, in its directory: `results.json` and `predictions*.jsonl`."""

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
from prefix_jax.evaluate.report import Report, read_predictions, save_predictions
from prefix_jax.evaluate.run import Evaluation
from prefix_jax.untrusted.json import read_json_object
from prefix_jax.untrusted.paths import explain

_NAMES = {"before", "after"}


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run measured at its end.

    Attributes:
        step: the step whose prefix was measured.
        evaluations: of the test split, by name: "after", and "before" where it was asked for.
    """

    step: int
    evaluations: Mapping[str, Evaluation]


def save_results(directory: Path, config: Config, results: Results) -> None:
    """Writes results into the run directory: the last thing that a run does.

    Raises:
        PrefixJaxError: the disk does not take them.
    """
    for name, found in results.evaluations.items():
        path = _predictions(directory, name)
        if found.predictions:
            save_predictions(path, found.predictions)
        else:
            path.unlink(missing_ok=True)
    content = {
        "step": results.step,
        "test": {name: found.report.as_dict() for name, found in results.evaluations.items()},
        "config": _digest(config),
    }
    write_whole(directory / "results.json", json.dumps(content, indent=2) + "\n")


def read_results(directory: Path, config: Config) -> Results | None:
    """Results of the run of a config; None if it has not ended.

    Raises:
        CheckpointError: the files cannot be read, or are damaged.
    """
    path = directory / "results.json"
    if not os.path.lexists(path):
        return None
    try:
        content = read_json_object(path, PrefixJaxError)
        if content.get("config") != _digest(config):
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
        remedy = "remove it, and the run measures again"
        if isinstance(error.__cause__, OSError):
            remedy = "give this user the right to read it, or choose another output_dir"
        why = str(error).removeprefix(f"{path}: ").removeprefix("cannot be read ")
        raise CheckpointError(f"{path} cannot be read ({why.strip('()')}); {remedy}") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        CheckpointError: the disk does not take it.
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


def _digest(config: Config) -> str:
    """Tells whether results are those of a config; its directory may have moved since."""
    return hashlib.sha256(
        configs.dump(dataclasses.replace(config, output_dir="")).encode()
    ).hexdigest()
