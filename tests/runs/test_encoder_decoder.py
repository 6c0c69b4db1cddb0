"""Runs of an encoder-decoder: training, storing, evaluating and generating."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_runs

import prefix_jax as pj
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.cli.main import main
from prefix_jax.errors import CheckpointError, ConfigError, PrefixError

pytestmark = pytest.mark.usefixtures("without_plot")

WORDS = ("oak", "elm", "fir", "ash")
RECORDS = [{"word": word} for word in WORDS]
COPY = {"input": "{word}", "target": "{word}"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return tiny_runs.on_one_device(tiny.write_t5(tmp_path_factory.mktemp("t5") / "model"))


@pytest.fixture(scope="module")
def tuned(pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> pj.Tuned:
    return pj.fit(
        pretrained,
        pj.PrefixTuning(length=8),
        RECORDS,
        test=RECORDS,
        **COPY,
        steps=150,
        batch_size=4,
        learning_rate=0.1,
        output_dir=tmp_path_factory.mktemp("tuned"),
        overrides=[
            "evaluate.metrics=[loss,exact_match,rougeL]",
            "evaluate.compare_baseline=true",
            "decode.max_new_tokens=6",
        ],
        quiet=True,
    )


def test_learns_to_copy(tuned: pj.Tuned) -> None:
    before, after = (tuned.run.evaluations[name].report.metrics for name in ("before", "after"))
    assert after["loss"] < before["loss"]
    assert (after["exact_match"], after["rougeL"]) == (100, pytest.approx(100))
    assert before["exact_match"] < 100
    assert tuned.generate(RECORDS) == list(WORDS)


def test_beam_search_ends_with_the_target(tuned: pj.Tuned) -> None:
    generation = tuned.generate(RECORDS[0], details=True, max_new_tokens=6, num_beams=2)
    assert generation.text == "oak"
    assert generation.samples[0].finish == "eos"


def test_most_likely_label_is_the_trained_one(tuned: pj.Tuned) -> None:
    evaluation = tuned.evaluate(RECORDS, ("accuracy",), labels=WORDS)
    assert evaluation.report.metrics["accuracy"] == 100


def test_stores_every_attention_and_generates_the_same(
    tuned: pj.Tuned, pretrained: Pretrained, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tuned.run.directory
    loaded = pj.load_prefix(directory, pretrained)
    assert list(loaded.prefix.sites) == ["encoder", "decoder", "cross"]
    assert loaded.card.geometry.encoder.layers == 3
    assert loaded.card.geometry.decoder.layers == 2
    assert [prediction.prediction for prediction in loaded.predict(RECORDS)] == list(WORDS)
    assert main(["generate", str(directory), "--record", json.dumps(RECORDS[1])]) == 0
    assert capsys.readouterr().out == "elm\n"


def test_killed_run_ends_bit_identical(pretrained: Pretrained, tmp_path: Path) -> None:
    hard = ("method.dropout=0.2", "data.group_by_source=true", "optim.grad_accum_steps=2")
    with tiny_runs.killed_at(7):
        tiny_runs.run(pretrained, tmp_path / "killed", *hard, dev=tiny_runs.SOME)
    others = [record | {"sum": "0+0"} for record in tiny_runs.RECORDS]
    with pytest.raises(CheckpointError, match="other training examples"):
        tiny_runs.run(pretrained, tmp_path / "killed", *hard, dev=tiny_runs.SOME, train=others)
    for output in ("killed", "whole"):
        tiny_runs.run(pretrained, tmp_path / output, *hard, dev=tiny_runs.SOME)
    assert tiny_runs.outcome(tmp_path / "killed") == tiny_runs.outcome(tmp_path / "whole")


def test_soft_tokens_in_the_encoder_start_as_text_and_are_not_packed(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    console = tiny_runs.console()
    options = ("method=prompt", "train.steps=1", "optim.learning_rate=1e-9")
    run = tiny_runs.run(pretrained, tmp_path, *options, console=console)
    assert "data.pack has no effect: with soft tokens in an encoder" in tiny_runs.shown(console)
    first = pretrained.tokenizer("0+0=")["input_ids"]
    table_VD = pretrained.params["embed"]["tokens_VD"]
    np.testing.assert_allclose(
        run.produced.x_PD[: len(first)], table_VD[np.array(first)], atol=1e-6
    )


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (("method=hidden",), PrefixError, r"method\.name: prefix"),
        (("data.loss=all",), ConfigError, r"data\.loss: target"),
        (
            ("data.input=null", "data.target=null", "data.messages=chat"),
            ConfigError,
            r"data\.messages: .* templates",
        ),
    ],
)
def test_refusals_name_an_alternative(
    pretrained: Pretrained, tmp_path: Path, overrides, error, message: str
) -> None:
    with pytest.raises(error, match=message):
        tiny_runs.run(pretrained, tmp_path, *overrides)
