"""Complete runs: outputs, and the selection of the best step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs

from prefix_jax import artifact
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.errors import (
    ConfigError,
    DataError,
)
from prefix_jax.evaluate.predictor import Predictor


def test_writes_prefix_metrics_and_predictions(pretrained: Pretrained, tmp_path: Path) -> None:
    console = tiny_runs.console()
    run = tiny_runs.run(
        pretrained,
        tmp_path,
        *("evaluate.metrics=[loss,chrf]", "evaluate.compare_baseline=true", "train.eval_every=6"),
        dev=tiny_runs.SOME,
        test=tiny_runs.SOME,
        console=console,
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("config.yaml", "checkpoints", "metrics.jsonl", "tensorboard", "loss.png"),
        *("prefix", "results.json", "predictions.jsonl", "predictions-before.jsonl"),
    }

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["step"] == run.step == 12
    for name, evaluation in run.evaluations.items():
        metrics = evaluation.report.metrics
        assert results["test"][name]["metrics"] == pytest.approx(dict(metrics))
        assert set(metrics) == {"loss", "perplexity", "chrf"}
    before, after = (results["test"][name]["metrics"] for name in ("before", "after"))
    assert after["loss"] < before["loss"]

    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    assert [p["prompt"] for p in predictions] == [r["sum"] + "=" for r in tiny_runs.SOME]
    assert [p["references"] for p in predictions] == [[r["total"]] for r in tiny_runs.SOME]
    assert [p["origin"] for p in predictions] == [f"record {i}" for i in range(1, 5)]

    produced, card = artifact.load(tmp_path)
    assert tiny_runs.bits(produced) == tiny_runs.bits(run.produced)
    assert card.metrics["test_loss"] == pytest.approx(after["loss"])
    assert (card.steps, card.task["input"]) == (12, "{sum}=")
    # During training only the first metric is measured.
    (dev, last) = (line for line in tiny_runs.metrics(tmp_path) if line["kind"] == "dev")
    assert (dev["step"], last["step"]) == (6, 12)
    assert set(dev) == {"step", "kind", "loss", "perplexity"}
    assert last["loss"] < dev["loss"] < before["loss"]
    assert "256 trained (prefix); 20 training examples, 12 steps of 4" in tiny_runs.shown(console)


def test_only_records_with_measured_text_need_references(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    referenced = [{**record, "refs": [record["total"], "7"]} for record in tiny_runs.SOME]
    options = ("data.references=refs", "evaluate.metrics=[loss,exact_match]", "train.steps=1")
    run = tiny_runs.run(pretrained, tmp_path / "a", *options, dev=tiny_runs.SOME, test=referenced)
    predictions = run.evaluations["after"].predictions
    assert [list(p.references) for p in predictions] == [r["refs"] for r in referenced]
    with pytest.raises(DataError, match="record 1: no field 'refs'"):
        tiny_runs.run(pretrained, tmp_path / "b", *options, test=tiny_runs.SOME)
    options = (*options, "evaluate.metrics=[exact_match]")
    with pytest.raises(DataError, match="record 1: no field 'refs'"):
        tiny_runs.run(pretrained, tmp_path / "b", *options, dev=tiny_runs.SOME)


def test_exports_the_best_step_and_stops_early(
    pretrained: Pretrained, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    measured = iter([5.0, 3.0, 4.0, 3.5, 2.0])  # after steps 2, 4, 6, 8, and on test
    monkeypatch.setattr(Predictor, "loss", lambda *_: next(measured))
    console = tiny_runs.console()
    splits = {"dev": tiny_runs.SOME, "test": tiny_runs.SOME}
    options = ("train.eval_every=2", "train.patience=2", "train.keep_checkpoints=1")
    run = tiny_runs.run(pretrained, tmp_path, *options, console=console, **splits)
    assert next(measured, None) is None
    assert "stopped early: loss on dev has not improved for 2 evaluations (best at step 4)" in (
        tiny_runs.shown(console)
    )
    assert run.step == run.card.steps == 4
    assert run.interrupted is None
    # The best checkpoint is kept in addition to the latest.
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "8"]
    key = "['train']['prefix']['decoder']['k_LPKH']"
    stored = tiny_runs.state(tmp_path, 4)[key]
    produced, _ = artifact.load(tmp_path)
    assert np.asarray(produced.decoder.inside.k_LPKH).tobytes() == stored[2]
    assert tiny_runs.state(tmp_path, 8)[key] != stored

    # The same config measures the same prefix again without training.
    measured = iter([2.0])
    again = tiny_runs.run(pretrained, tmp_path, *options, **splits)
    assert again.step == 4
    assert tiny_runs.bits(again.produced) == tiny_runs.bits(run.produced)


def test_generated_text_selects_the_best_step(
    pretrained: Pretrained, tmp_path: Path, monkeypatch
) -> None:
    answers = iter([["00"] * 4, ["02", "03", "04", "00"], ["02"] + ["00"] * 3])
    seen = []

    def generate(predictor: Predictor, model: Any, inputs: Any) -> list[str]:
        real = unpatched(predictor, model, inputs)  # accepts stacked and unstacked weights
        seen.append((isinstance(model.params["layers"], tuple), len(real)))
        return next(answers)

    unpatched = Predictor.generate
    monkeypatch.setattr(Predictor, "generate", generate)
    run = tiny_runs.run(
        pretrained,
        tmp_path,
        *("evaluate.metrics=[exact_match,loss]", "train.eval_every=6"),
        dev=tiny_runs.SOME,
        test=tiny_runs.SOME,
    )
    dev = [line["exact_match"] for line in tiny_runs.metrics(tmp_path) if line["kind"] == "dev"]
    assert dev == [0, 75]
    assert run.step == 12
    assert seen == [(False, 4), (False, 4), (True, 4)]
    assert run.evaluations["after"].report.metrics["exact_match"] == 25
    assert run.evaluations["after"].predictions[0].prediction == "02"


def test_stores_the_last_step_if_the_best_checkpoint_is_damaged(
    pretrained: Pretrained, tmp_path: Path, monkeypatch
) -> None:
    measured = iter([1.0, *[5.0] * 20])
    monkeypatch.setattr(Predictor, "loss", lambda *_: next(measured))
    splits, options = {"dev": tiny_runs.SOME, "test": tiny_runs.SOME}, ("train.eval_every=6",)
    assert tiny_runs.run(pretrained, tmp_path, *options, **splits).step == 6
    shutil.rmtree(tmp_path / "prefix")
    (tmp_path / "results.json").unlink()
    array = next(path for path in (tmp_path / "checkpoints/6/state/d").iterdir())
    array.write_bytes(array.read_bytes()[:-1] + b"?")

    console = tiny_runs.console()
    run = tiny_runs.run(pretrained, tmp_path, *options, console=console, **splits)
    assert run.step == run.card.steps == 12
    assert (
        "warning: storing the prefix of the last step (12) instead of the best on dev (6): "
        "checkpoint" in tiny_runs.shown(console)
    )
    key = "['train']['prefix']['decoder']['k_LPKH']"
    produced, _ = artifact.load(tmp_path)
    assert (
        np.asarray(produced.decoder.inside.k_LPKH).tobytes()
        == (tiny_runs.state(tmp_path, 12)[key][2])
    )


def test_full_fine_tuning_trains_a_copy_of_the_backbone(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    before = tiny_runs.bits(pretrained.stacked())
    options = ("method=full", "optim.learning_rate=1e-3", "evaluate.compare_baseline=true")
    run = tiny_runs.run(pretrained, tmp_path, *options, test=tiny_runs.SOME)
    losses = {name: e.report.metrics["loss"] for name, e in run.evaluations.items()}
    assert losses["after"] < losses["before"]
    assert (run.produced, run.card) == (None, None)
    assert not (tmp_path / "prefix").exists()
    # The given weights are unchanged; the trained ones are another backbone.
    assert tiny_runs.bits(pretrained.stacked()) == before
    assert run.pretrained.fingerprint != pretrained.fingerprint
    assert run.pretrained.tokenizer is pretrained.tokenizer


def test_reports_truncated_and_dropped_examples(pretrained: Pretrained, tmp_path: Path) -> None:
    console = tiny_runs.console()
    long = {"sum": "1" * 30, "total": "00"}, {"sum": "1+1", "total": "0" * 30}
    options = ("data.max_length=12", "data.on_overflow=drop", "train.steps=1")
    train = [*tiny_runs.RECORDS, *long]
    tiny_runs.run(pretrained, tmp_path, *options, train=train, console=console)
    assert "train: 1 of 22 examples were truncated (first: record 21)" in tiny_runs.shown(console)
    assert "train: 1 of 22 examples were dropped (first: record 22)" in tiny_runs.shown(console)


def test_lengthening_a_finished_run_suggests_starting_from_its_prefix(
    pretrained: Pretrained, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        tiny_runs.run(pretrained, whole, "train.keep_checkpoints=9", "train.steps=20")
    settings = f"init.start=prefix init.path={whole}"
    assert settings in str(raised.value)
    run = tiny_runs.run(pretrained, tmp_path, "train.steps=1", *settings.split())
    assert run.step == 1
