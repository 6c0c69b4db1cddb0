"""Tests that scores match their definitions, and that the backbone stays usable."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.backbones.stacking import Params
from prefix_jax.config import DecodeConfig, EvaluateConfig
from prefix_jax.data.batch import Example
from prefix_jax.data.source import read_records
from prefix_jax.decode.generate import Generator
from prefix_jax.errors import ConfigError, ContextError, NonFiniteError
from prefix_jax.evaluate.evaluator import Evaluator, better
from prefix_jax.evaluate.predictor import Predictor, Steered
from prefix_jax.mesh import make_mesh
from prefix_jax.model import PrefixModel, start_from_ids
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import Prefix
from prefix_jax.tasks import Classify, Reader, TextTask

TASK = TextTask("{input}", "{answer}")
DECODE = DecodeConfig(max_new_tokens=4)
LABELS = ("yes", "no", "maybe so")
# Two inputs, one with two answers, with different lengths, so that rows have padding.
RECORDS = [
    {"input": "is it?", "answer": ["yes", "maybe so"]},
    {"input": "what, now and then and again?", "answer": "no"},
    {"input": "who", "answer": "yes"},
]


@pytest.fixture(scope="module")
def pretrained(tiny_model_dir: Path) -> Pretrained:
    return tiny_runs.on_one_device(tiny_model_dir)


@pytest.fixture(scope="module")
def examples(pretrained: Pretrained) -> list[Example]:
    return TASK.examples(read_records(RECORDS), Reader(pretrained.tokenizer))


@pytest.fixture(scope="module")
def prefix(pretrained: Pretrained) -> Prefix:
    ids = np.arange(60, 65)
    return start_from_ids(pretrained.backbone, pretrained.stacked(), Prefix, ids, 5)


def evaluator(pretrained: Pretrained, *metrics: str, **settings: object) -> Evaluator:
    model = PrefixModel(pretrained.backbone, None, TASK)
    return Evaluator(
        model,
        model.reader(pretrained.tokenizer),
        pretrained.mesh,
        EvaluateConfig(metrics=metrics, **settings),
        DECODE,
    )


def by_hand(
    pretrained: Pretrained, prefix: Prefix | None, ids: Sequence[int], target: Sequence[bool]
) -> float:
    """Computes the summed negative log-likelihood of one example's targets without batching."""
    row = np.full((1, 48), -1, np.int32)
    row[0, : len(ids)] = ids
    logprob_TV = np.asarray(logprobs(pretrained.backbone, pretrained.params, prefix, row))
    return -sum(logprob_TV[t - 1, ids[t]] for t in range(len(ids)) if target[t])


@functools.partial(jax.jit, static_argnums=0)
def logprobs(backbone: Backbone, params: Params, prefix: Prefix | None, row: jax.Array) -> Any:
    tokens = TokenLayout.plain(row >= 0)
    h_BTD, _ = backbone.hidden(params, jnp.maximum(row, 0), tokens, prefix)
    return jax.nn.log_softmax(backbone.unembed(params, h_BTD)[0])


@pytest.mark.parametrize("with_prefix", [False, True])
def test_loss_is_the_mean_over_all_target_tokens(
    pretrained: Pretrained, examples: list[Example], prefix: Prefix, with_prefix: bool
) -> None:
    given = prefix if with_prefix else None
    pretrained.stacked()
    total = sum(by_hand(pretrained, given, e.ids_T, e.target_T) for e in examples)
    targets = sum(int(e.target_T.sum()) for e in examples)
    evaluation = evaluator(pretrained, "loss", batch_size=3)(
        pretrained.stacked(), given, examples, ["loss"]
    )
    assert evaluation.report.metrics["loss"] == pytest.approx(total / targets, rel=1e-5)
    assert evaluation.report.metrics["perplexity"] == pytest.approx(
        math.exp(total / targets), rel=1e-4
    )
    assert evaluation.predictions == []


def test_accuracy_uses_the_likeliest_label_of_each_input(
    pretrained: Pretrained, examples: list[Example], prefix: Prefix
) -> None:
    tokenizer = pretrained.tokenizer
    evaluation = evaluator(pretrained, "accuracy", labels=LABELS, batch_size=4)(
        pretrained.stacked(), prefix, examples, ["accuracy"]
    )
    expected = []
    for record in RECORDS:
        prompt, *answers = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (record["input"], *LABELS)
        )
        losses = []
        for answer in answers:
            ids = [*prompt, *answer, tokenizer.eos_token_id]
            target = [t >= len(prompt) for t in range(len(ids))]
            losses.append(by_hand(pretrained, prefix, ids, target))
        expected.append(LABELS[int(np.argmin(losses))])
    assert [prediction.prediction for prediction in evaluation.predictions] == expected
    # Both answers of the first input are correct.
    hits = [
        label in np.atleast_1d(record["answer"])
        for label, record in zip(expected, RECORDS, strict=True)
    ]
    assert evaluation.report.metrics["accuracy"] == pytest.approx(100 * sum(hits) / 3)
    assert evaluation.report.examples == 3


def test_rejects_labels_that_are_not_targets(
    pretrained: Pretrained, examples: list[Example], prefix: Prefix
) -> None:
    chosen = evaluator(pretrained, "accuracy", labels=(" yes", " no"))
    message = "' yes', ' no' do not occur as targets in the data, such as 'yes'"
    with pytest.raises(ConfigError, match=message):
        chosen.check(examples, ["accuracy"])
    with pytest.raises(ConfigError, match=message):
        chosen(pretrained.stacked(), prefix, examples, ["accuracy"])


def test_rejects_label_that_exceeds_the_positions(pretrained: Pretrained, prefix: Prefix) -> None:
    records = [{"input": "x" * 240, "answer": "yes"}]
    long = TASK.examples(read_records(records), Reader(pretrained.tokenizer))
    # 240 tokens, a label of 11 and the end of text fit 256 positions, but not with 5 slots.
    chosen = evaluator(pretrained, "accuracy", labels=("yes", "n" * 11))
    chosen.check(long, ["accuracy"])
    with pytest.raises(ContextError, match=r"record 1: .* 252 tokens exceed the 251 positions"):
        chosen(pretrained.stacked(), prefix, long, ["accuracy"])


def test_rejects_generation_from_an_empty_input(pretrained: Pretrained) -> None:
    task = TextTask(target="{answer}")
    (example,) = task.examples(read_records(RECORDS[1:2]), Reader(pretrained.tokenizer))
    bare = dataclasses.replace(example, prompt_length=0)
    evaluator(pretrained, "loss").check([bare], ["loss"])
    with pytest.raises(ConfigError, match="has no input from which to generate a text"):
        evaluator(pretrained, "loss", "bleu").check([bare], ["loss", "bleu"])


def test_generates_once_per_input_and_scores_on_all_references(
    pretrained: Pretrained, examples: list[Example], prefix: Prefix
) -> None:
    evaluation = evaluator(pretrained, "chrf", "exact_match")(
        pretrained.stacked(), prefix, examples, ["chrf", "exact_match"]
    )
    generator = Generator(pretrained.backbone, pretrained.params, pretrained.tokenizer, prefix)
    prompts = [record["input"] for record in RECORDS]
    expected = [item.text.strip() for item in generator.generate(prompts, DECODE)]
    assert [item.prediction for item in evaluation.predictions] == expected
    assert [item.prompt for item in evaluation.predictions] == prompts
    references = [("yes", "maybe so"), ("no",), ("yes",)]
    assert [item.references for item in evaluation.predictions] == references
    assert list(evaluation.report.metrics) == ["chrf", "exact_match"]
    assert "chrf" in evaluation.report.signatures


def test_compares_prefixes_and_metrics(
    pretrained: Pretrained, examples: list[Example], prefix: Prefix
) -> None:
    before = tiny_runs.bits(pretrained.stacked())
    metrics = ("exact_match", "accuracy", "loss")
    judge = evaluator(pretrained, *metrics, labels=LABELS)
    evaluations = judge.compare(pretrained, {"bare": None, "tuned": prefix}, examples)
    assert list(evaluations) == ["bare", "tuned"]
    for name, given in {"bare": None, "tuned": prefix}.items():
        alone = {
            metric: judge(pretrained.stacked(), given, examples, [metric]).report.metrics[metric]
            for metric in metrics
        }
        measured = dict(evaluations[name].report.metrics)
        measured.pop("perplexity")
        assert measured == pytest.approx(alone)
        # Generated texts are kept rather than chosen labels.
        written = judge(pretrained.stacked(), given, examples, ["exact_match"])
        assert evaluations[name].predictions == written.predictions
    assert tiny_runs.bits(pretrained.stacked()) == before


def test_limit_measures_only_the_first_examples(
    pretrained: Pretrained, examples: list[Example]
) -> None:
    params = pretrained.stacked()
    limited = evaluator(pretrained, "loss", max_examples=2)(params, None, examples, ["loss"])
    first = evaluator(pretrained, "loss")(params, None, examples[:2], ["loss"])
    assert limited == first


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"sequence": 4}])
def test_mesh_does_not_change_scores(
    pretrained: Pretrained,
    tiny_model_dir: Path,
    examples: list[Example],
    prefix: Prefix,
    sizes: dict[str, int],
) -> None:
    metrics = ("loss", "accuracy", "exact_match")
    prefixes = {"": jax.device_get(prefix)}
    spread = load(tiny_model_dir, mesh=make_mesh(**{"data": 2} | sizes))
    evaluations = [
        evaluator(where, *metrics, labels=LABELS).compare(where, prefixes, examples)
        for where in (pretrained, spread)
    ]
    single, eight = (dict(each[""].report.metrics) for each in evaluations)
    assert eight == pytest.approx(single, rel=1e-4)
    assert evaluations[0][""].predictions == evaluations[1][""].predictions


@pytest.mark.parametrize("metric", ["accuracy", "bleu"])
def test_non_finite_weights_are_an_error(
    pretrained: Pretrained, examples: list[Example], metric: str
) -> None:
    nowhere = jax.tree.map(lambda leaf: leaf * jnp.nan, pretrained.stacked())
    judge = evaluator(pretrained, metric, labels=LABELS)
    with pytest.raises(NonFiniteError, match="are NaN or infinite; check the weights"):
        judge(nowhere, None, examples, [metric])


def test_non_finite_head_outputs_are_an_error(
    pretrained: Pretrained, examples: list[Example]
) -> None:
    model = PrefixModel(pretrained.backbone, None, Classify("{x}", labels=("no", "yes")))
    judge = Predictor(model, model.reader(pretrained.tokenizer), pretrained.mesh)
    (example,) = examples[:1]
    labelled = Example(
        ids_T=example.ids_T, index_M=np.array([1]), label_M=np.array([1]), origin="a:1"
    )
    weights = {"out_DY": np.full((32, 2), np.nan, np.float32)}
    with pytest.raises(NonFiniteError, match=r"^a:1: the outputs of the head are NaN or infinite"):
        judge.passes["head"](Steered(pretrained.stacked(), None, weights), [labelled])


def test_truncated_prompt_is_scored_like_in_training(
    pretrained: Pretrained, examples: list[Example]
) -> None:
    """Labels follow exactly the same tokens as targets in training."""
    ids_T, target_T = examples[1].ids_T[4:], examples[1].target_T[4:]
    references = examples[1].references
    cut = Example.of_text(ids_T, target_T, "cut", references=references, prompt_length=25)
    judge = evaluator(pretrained, "accuracy", labels=("no", "yes"))
    evaluation = judge(pretrained.stacked(), None, [cut], ["accuracy"])
    prompt = cut.ids_T[: cut.prompt_length].tolist()
    ends = [pretrained.tokenizer.eos_token_id]
    losses = []
    for label in ("no", "yes"):
        ids = prompt + pretrained.tokenizer(label)["input_ids"] + ends
        losses.append(by_hand(pretrained, None, ids, [t >= len(prompt) for t in range(len(ids))]))
    assert evaluation.predictions[0].prediction == ("no", "yes")[int(np.argmin(losses))]


@pytest.mark.parametrize(
    ("metric", "value", "than", "expected"),
    [
        ("loss", 1.0, 2.0, True),
        ("loss", 2.0, 2.0, False),
        ("bleu", 2.0, 1.0, True),
        ("bleu", 1.0, 2.0, False),
        ("loss", 9.0, None, True),
        ("loss", 9.0, math.nan, True),
        ("loss", math.nan, 9.0, False),
        ("bleu", math.nan, 9.0, False),
    ],
)
def test_lower_losses_and_higher_scores_are_better(
    metric: str, value: float, than: float | None, expected: bool
) -> None:
    assert better(metric, value, than) is expected
