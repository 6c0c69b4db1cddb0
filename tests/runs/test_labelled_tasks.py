"""Runs of tasks with labels: training, storing and using a prefix with a head."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import tiny_runs
from rich.console import Console

import prefix_jax as pj
from prefix_jax import artifact, config
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.cli.main import main
from prefix_jax.errors import ConfigError, PrefixError
from prefix_jax.evaluate.predictions import read_predictions
from prefix_jax.runs.finish import RunResult
from prefix_jax.runs.run import run as run_config

pytestmark = pytest.mark.usefixtures("without_plot")


def _review(seed: int) -> dict[str, str]:
    """Returns three words, of which one determines the label."""
    rng, good = random.Random(seed), seed % 2 == 0
    words = rng.choices(["plot", "film", "was", "the", "very"], k=2)
    words.insert(rng.randrange(3), "good" if good else "bad")
    return {"text": " ".join(words), "label": "yes" if good else "no"}


TRAIN, TEST = [_review(i) for i in range(48)], [_review(i) for i in range(100, 116)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return tiny_runs.on_one_device(tiny.write_encoder(tmp_path_factory.mktemp("tiny") / "bert"))


@pytest.fixture(scope="module")
def decoder(tiny_model_dir: Path) -> Pretrained:
    return tiny_runs.on_one_device(tiny_model_dir)


def run(
    pretrained: Pretrained,
    output: Path,
    *overrides: str,
    task: dict[str, Any],
    console: Console | None = None,
    **records: Any,
) -> RunResult:
    values = {
        "model": {"path": pretrained.source},
        "method": {"name": "prefix", "length": 3},
        "init": {"start": "random"},
        "data": {"batch_size": 8},
        "optim": {"learning_rate": 0.1, "head_learning_rate": 0.03},
        "train": {"steps": 3},
        "task": task,
        "output_dir": str(output),
    }
    parsed = config.parse(values, overrides)
    quiet = console is None
    return run_config(parsed, pretrained=pretrained, records=records, console=console, quiet=quiet)


@pytest.fixture(scope="module")
def trained(encoder: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(
        encoder,
        tmp_path_factory.mktemp("trained") / "run",
        "data.input={text}",
        "train.steps=80",
        "train.eval_every=40",
        "evaluate.metrics=[accuracy,loss]",
        task={"name": "classify", "dropout": 0.0},
        train=TRAIN,
        dev=TEST,
        test=TEST,
    )


def test_prefix_and_head_learn_a_rule(trained: RunResult) -> None:
    assert trained.evaluations["after"].report.metrics["accuracy"] == 100
    assert trained.card.task["labels"] == ["no", "yes"]
    predictions = read_predictions(trained.directory / "predictions.jsonl")
    assert [item.prediction for item in predictions] == [record["label"] for record in TEST]
    assert all(sum(item.scores.values()) == pytest.approx(1) for item in predictions)


def test_stored_prefix_predicts_the_same(
    trained: RunResult, encoder: Pretrained, tmp_path: Path
) -> None:
    tuned = pj.load_prefix(trained.directory, encoder)
    texts = [record["text"] for record in TEST]
    assert [item.prediction for item in tuned.predict(texts)] == [r["label"] for r in TEST]
    predictions = tuned.predict([{"text": text} for text in texts], output=tmp_path / "a.jsonl")
    stored = read_predictions(tmp_path / "a.jsonl")
    assert [item.scores for item in stored] == [item.scores for item in predictions]
    assert tuned.predict(TEST) == predictions
    metrics = tuned.evaluate(TEST, ["loss", "accuracy", "f1"]).report.metrics
    assert metrics["loss"] == pytest.approx(trained.evaluations["after"].report.metrics["loss"])
    assert (metrics["accuracy"], metrics["f1"]) == (100, 100)
    with pytest.raises(PrefixError, match="cannot generate text; use predict"):
        tuned.generate("a good film")
    with pytest.raises(ConfigError, match=r"task\.name classify: unknown metric 'bleu'"):
        tuned.evaluate(TEST, ["bleu"])


def test_without_templates_accepts_texts_but_refuses_records(
    trained: RunResult, encoder: Pretrained
) -> None:
    """As after an import from PEFT without templates."""
    tuned = pj.load_prefix(trained.directory, encoder)
    card = dataclasses.replace(tuned.card, task=tuned.card.task | {"input": None})
    bare = dataclasses.replace(tuned, card=card)
    assert bare.predict(["a good film"])[0].prediction == "yes"
    with pytest.raises(PrefixError, match=r"stored without templates.* data\.input"):
        bare.predict(TEST)


def test_container_includes_the_head(
    trained: RunResult, encoder: Pretrained, tmp_path: Path
) -> None:
    tuned = pj.load_prefix(trained.directory, encoder)
    tuned.save(tmp_path / "again", "safetensors")
    head = artifact.load_head(tmp_path / "again")
    assert sorted(head) == ["out_DY", "out_bias_Y"]
    jax.tree.map(np.testing.assert_array_equal, head, dict(trained.head))


def test_command_line_predicts_and_evaluates(
    trained: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in TEST[:4]))
    assert main(["predict", str(trained.directory), "--input", str(data)]) == 0
    assert capsys.readouterr().out.split() == [record["label"] for record in TEST[:4]]
    arguments = ["--data", str(data), "--metrics", "accuracy"]
    assert main(["evaluate", str(trained.directory), *arguments]) == 0
    assert "100.00" in capsys.readouterr().out
    assert main(["inspect", str(trained.directory)]) == 0
    assert "classify (no, yes), with a head of 66 parameters" in capsys.readouterr().out
    assert main(["generate", str(trained.directory), "--prompt", "a"]) == 2
    assert "prefix-jax predict" in capsys.readouterr().err


def test_killed_run_ends_bit_identical(encoder: Pretrained, tmp_path: Path) -> None:
    """With dropout in the prefix and the head."""
    options = ("data.input={text}", "train.steps=4", "train.checkpoint_every=2")
    options += ("method.dropout=0.2",)
    task = {"name": "classify", "dropout": 0.2}
    run(encoder, tmp_path / "whole", *options, task=task, train=TRAIN, test=TEST)
    with tiny_runs.killed_at(3):
        run(encoder, tmp_path / "killed", *options, task=task, train=TRAIN, test=TEST)
    run(encoder, tmp_path / "killed", *options, task=task, train=TRAIN, test=TEST)
    assert tiny_runs.outcome(tmp_path / "killed") == tiny_runs.outcome(tmp_path / "whole")


_TAGS = [{"tokens": ["good", "film"], "label": ["O", "B-X"]}] * 8
_ANSWERS = {"text": ["paris"], "answer_start": [9]}
_SPANS = [{"q": "where", "c": "film was paris".replace("was ", "is  "), "label": _ANSWERS}] * 8
_CHOICES = [{"q": "the film", "a": "was good", "b": "was bad", "label": i % 2} for i in range(8)]
_RANKED = [
    {"q": "the film", "a": "was good", "b": "was bad", "label": [i % 2, 1]} for i in range(8)
]
_VALUES = [{"text": "good film", "label": i / 8} for i in range(8)]
TASKS = {
    "regress": (["data.input={text}"], {}, _VALUES, ["loss", "pearson", "spearman"]),
    "tag": ([], {}, _TAGS, ["loss", "accuracy", "f1"]),
    "span": (["data.input={q}", "data.pair={c}"], {"stride": 4}, _SPANS, ["exact_match", "f1"]),
    "choice": (["data.input={q}"], {"choices": ["{a}", "{b}"]}, _CHOICES, ["loss", "accuracy"]),
    "rank": (["data.input={q}"], {"choices": ["{a}", "{b}"]}, _RANKED, ["ndcg", "mrr", "loss"]),
}


@pytest.mark.parametrize("name", TASKS)
def test_trains_evaluates_and_predicts_every_task(
    name: str, encoder: Pretrained, tmp_path: Path
) -> None:
    options, fields, records, metrics = TASKS[name]
    names = f"evaluate.metrics=[{','.join(metrics)}]"
    task = {"name": name, **fields}
    result = run(encoder, tmp_path, names, *options, task=task, train=records, test=records)
    assert set(metrics) <= set(result.evaluations["after"].report.metrics)
    tuned = pj.load_prefix(tmp_path, encoder)
    unlabelled = [{k: v for k, v in record.items() if k != "label"} for record in records]
    texts = [item.prediction for item in tuned.predict(unlabelled)]
    assert texts == [item.prediction for item in result.evaluations["after"].predictions]
    assert len(texts) == len(records)


def test_decoder_classifies_by_its_last_token(decoder: Pretrained, tmp_path: Path) -> None:
    console = tiny_runs.console()
    result = run(
        decoder,
        tmp_path,
        "data.input={text}",
        "evaluate.metrics=[accuracy]",
        task={"name": "classify"},
        console=console,
        train=TRAIN[:8],
        test=TEST[:4],
    )
    assert sorted(result.head) == ["out_DY"]
    assert "(prefix and head); 8 training examples" in tiny_runs.shown(console)
    assert "labels: 'no', 'yes'" in tiny_runs.shown(console)
    assert len(result.evaluations["after"].predictions) == 4


def test_soft_tokens_in_an_encoder_use_one_row_per_text(
    encoder: Pretrained, tmp_path: Path
) -> None:
    """The head reads [CLS], not the first soft token."""
    options = ("method={name: prompt, length: 3}", "optim.learning_rate=0.3")
    result = run(
        encoder,
        tmp_path / "prompt",
        "data.input={text}",
        "evaluate.metrics=[loss]",
        *options,
        task={"name": "classify"},
        train=TRAIN[:8],
        test=TEST[:4],
    )
    assert np.isfinite(result.evaluations["after"].report.metrics["loss"])
    with pytest.raises(ConfigError, match="does not fit soft tokens before an encoder"):
        run(
            encoder,
            tmp_path / "choice",
            "data.input={q}",
            *options,
            task={"name": "choice", "choices": ["{a}", "{b}"]},
            train=_CHOICES,
        )


def test_encoder_rejects_generation(encoder: Pretrained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.name: bert is an encoder, which writes no text"):
        run(encoder, tmp_path, "data.target={label}", task={"name": "generate"}, train=TRAIN)


def test_encoder_decoder_rejects_a_head(tmp_path: Path) -> None:
    both = tiny_runs.on_one_device(tiny.write_bart(tmp_path / "bart"))
    with pytest.raises(ConfigError, match="let it generate the label as text"):
        run(both, tmp_path / "run", "data.input={text}", task={"name": "classify"}, train=TRAIN)


def test_learning_rate_of_a_head_requires_a_head(decoder: Pretrained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no head"):
        run(decoder, tmp_path, "data.target={label}", task={"name": "generate"}, train=TRAIN)


def test_head_can_read_the_first_soft_token_like_peft(encoder: Pretrained, tmp_path: Path) -> None:
    result = run(
        encoder,
        tmp_path / "soft",
        "data.input={text}",
        "method={name: prompt, length: 3}",
        "train.steps=30",
        task={"name": "classify", "reads_soft": True},
        train=TRAIN,
    )
    tuned = pj.load_prefix(result.directory, encoder)
    tuned.save(tmp_path / "theirs", "peft")
    again = pj.import_peft(
        tmp_path / "theirs", encoder, overrides=["data.input={text}", "task.labels=[no, yes]"]
    )
    scores = [answer.scores for answer in tuned.predict(TEST)]
    assert [answer.scores for answer in again.predict(TEST)] == scores
    # The head reads the text through the soft token.
    assert len({tuple(probabilities.items()) for probabilities in scores}) > 1
    # Without soft tokens it reads the text's first token.
    assert tuned.without_prefix().predict(TEST[:1])[0].scores != scores[0]


@pytest.mark.parametrize("method", ["prefix", "full"])
def test_head_cannot_read_soft_tokens_that_do_not_exist(
    encoder: Pretrained, tmp_path: Path, method: str
) -> None:
    options = ("data.input={text}", *(["method=full"] if method == "full" else []))
    task = {"name": "classify", "reads_soft": True}
    with pytest.raises(ConfigError, match="no soft tokens precede an encoder"):
        run(encoder, tmp_path / method, *options, task=task, train=TRAIN[:8])
    with pytest.raises(ConfigError, match=r"task\.reads_soft has no meaning for task\.name tag"):
        run(encoder, tmp_path / method, task={"name": "tag", "reads_soft": True}, train=TRAIN)


def test_full_fine_tuning_also_trains_a_head(encoder: Pretrained, tmp_path: Path) -> None:
    result = run(
        encoder,
        tmp_path,
        "data.input={text}",
        "method=full",
        "evaluate.metrics=[loss]",
        task={"name": "classify"},
        train=TRAIN[:8],
        test=TEST[:4],
    )
    assert result.produced is None
    assert result.head["out_bias_Y"].any()
    assert result.pretrained.fingerprint != encoder.fingerprint
