"""Saving the results of a run, and reading them for the same config."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from prefix_jax import config
from prefix_jax.errors import CheckpointError
from prefix_jax.evaluate.evaluator import Evaluation
from prefix_jax.evaluate.report import Report
from prefix_jax.runs.results import Results, config_digest, read_results, save_results
from prefix_jax.tasks import Prediction

PREDICTIONS = [Prediction("test.jsonl:1", "café\n", "One\u2028two", ["a", "b"])]


@pytest.fixture
def run(tmp_path):
    values = {"model": {"path": "m"}, "data": {"target": "{text}"}, "train": {"steps": 1}}
    return config.parse({**values, "output_dir": str(tmp_path / "run")})


def results(predictions=(), loss=2.5):
    report = Report({"loss": loss, "bleu": 40.0}, {"bleu": "tok:13a"}, 3)
    return Results(7, {"before": Evaluation(report, []), "after": Evaluation(report, predictions)})


def test_reads_what_was_saved(run):
    assert read_results(Path(run.output_dir), config_digest(run)) is None
    save_results(Path(run.output_dir), config_digest(run), results(PREDICTIONS))
    assert read_results(Path(run.output_dir), config_digest(run)) == results(PREDICTIONS)


def test_nonfinite_metrics_are_read_as_nan(run):
    save_results(Path(run.output_dir), config_digest(run), results(loss=math.inf))
    stored = read_results(Path(run.output_dir), config_digest(run))
    assert math.isnan(stored.evaluations["after"].report.metrics["loss"])


def test_ignores_results_of_another_config(run):
    save_results(Path(run.output_dir), config_digest(run), results())
    other = dataclasses.replace(run, decode=config.DecodeConfig(num_beams=2))
    assert read_results(Path(other.output_dir), config_digest(other)) is None


def test_results_may_move_with_their_directory(run, tmp_path):
    save_results(Path(run.output_dir), config_digest(run), results(PREDICTIONS))
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = dataclasses.replace(run, output_dir=str(tmp_path / "moved"))
    assert read_results(Path(moved.output_dir), config_digest(moved)) == results(PREDICTIONS)


def test_deletes_earlier_predictions(run):
    save_results(Path(run.output_dir), config_digest(run), results(PREDICTIONS))
    save_results(Path(run.output_dir), config_digest(run), results())
    assert read_results(Path(run.output_dir), config_digest(run)) == results([])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": 1', '{"step": 1}'])
def test_reports_damaged_results(run, tmp_path, content):
    save_results(Path(run.output_dir), config_digest(run), results())
    (tmp_path / "run" / "results.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"results\.json cannot be read"):
        read_results(Path(run.output_dir), config_digest(run))


@pytest.mark.parametrize(
    "change",
    [
        {"test": []},
        {"test": {"after": []}},
        {"test": {"../after": {}}},
        {"test": {"after": {"metrics": {"loss": "x"}, "signatures": {}, "examples": 3}}},
        {"test": {"after": {"metrics": {"loss": 10**400}, "signatures": {}, "examples": 3}}},
        {"test": {"after": {"metrics": {"loss": True}, "signatures": {}, "examples": 3}}},
        {"test": {"after": {"metrics": {"loss": 1}, "signatures": {"loss": 1}, "examples": 3}}},
        {"test": {"after": {"metrics": {}, "signatures": {}, "examples": "x"}}},
        {"step": "7"},
        {"step": None},
    ],
)
def test_reports_edited_results(run, change):
    path = Path(run.output_dir) / "results.json"
    save_results(Path(run.output_dir), config_digest(run), results())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"results\.json cannot be read .*to measure again"):
        read_results(Path(run.output_dir), config_digest(run))


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff",
        b"[]",
        b"[" * 100_000,
        b'{"source": "a", "prompt": "b", "prediction": "c"}',
        b'{"source": "a", "prompt": "b", "prediction": 1, "references": []}',
        b'{"source": "a", "prompt": "b", "prediction": "c", "references": "d"}',
        b'{"source": "a", "prompt": "b", "prediction": "\\ud800", "references": []}',
        b'{"source": "", "prompt": "", "prediction": "", "references": [], "scores": {"d": "e"}}',
        b'{"source": "a", "prompt": "b", "prediction": "c", "references": [], "more": 1}',
    ],
)
def test_reports_edited_predictions(run, line):
    save_results(Path(run.output_dir), config_digest(run), results(PREDICTIONS))
    (Path(run.output_dir) / "predictions.jsonl").write_bytes(line + b"\n")
    with pytest.raises(CheckpointError, match=r"predictions\.jsonl.*to measure again"):
        read_results(Path(run.output_dir), config_digest(run))


def test_reports_missing_permissions(run, monkeypatch):
    save_results(Path(run.output_dir), config_digest(run), results())
    opened = Path.open

    def refuse(self, *args, **kwargs):
        if self.name == "results.json":
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        CheckpointError, match=r"results\.json cannot be read \(Permission denied\); give this user"
    ):
        read_results(Path(run.output_dir), config_digest(run))
