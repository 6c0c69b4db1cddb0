"""What a run measured at its end, in its directory: `results.json` and `predictions*.jsonl`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from prefix_jax import config as configs
from prefix_jax.config import Config
from prefix_jax.errors import CheckpointError
from prefix_jax.evaluate.report import Report, read_predictions, save_predictions
from prefix_jax.evaluate.run import Evaluation


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
    """What the run of a config measured; None if it has not come to its end.

    Raises:
        PrefixJaxError: the files are damaged.
    """
    path = directory / "results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["config"] != _digest(config):
            return None
        evaluations = {}
        for name, report in content["test"].items():
            stored = _predictions(directory, name)
            predictions = read_predictions(stored) if stored.exists() else []
            evaluations[name] = Evaluation(Report.from_dict(report), predictions)
        return Results(content["step"], evaluations)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); remove it, and the run measures again"
        ) from error


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
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def _predictions(directory: Path, name: str) -> Path:
    return directory / ("predictions.jsonl" if name == "after" else f"predictions-{name}.jsonl")


def _digest(config: Config) -> str:
    """Tells whether results are those of a config; its directory may have moved since."""
    return hashlib.sha256(configs.dump(dataclasses.replace(config, output="")).encode()).hexdigest()
