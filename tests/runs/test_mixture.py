"""Multitask runs train one prefix per dataset."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
import tiny
import tiny_runs

from prefix_jax import api, artifact
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.config import DataConfig
from prefix_jax.data.source import read_records
from prefix_jax.errors import ConfigError, DataError, PrefixError
from prefix_jax.methods.multitask import MultitaskPromptTuning
from prefix_jax.methods.prefix import PrefixTuning
from prefix_jax.prefix import Embeds
from prefix_jax.runs.mixture import split_mixture

pytestmark = pytest.mark.usefixtures("without_plot")

# Two datasets with the same inputs but different targets, so that only their prompts differ.
RECORDS = [
    {"sum": record["sum"], "total": total, "kind": kind}
    for record in tiny_runs.RECORDS[:6]
    for kind, total in (("sum", record["total"]), ("first", record["sum"][0] * 2))
]
OPTIONS = (
    *("method.name=multitask", "method.ranks=2", "init.start=text", "data.dataset=kind"),
    *("data.batch_size=12", "train.steps=60", "train.checkpoint_every=30", "train.eval_every=30"),
    *("optim.learning_rate=0.1", "evaluate.metrics=[loss]"),
)


@pytest.fixture(scope="module")
def run(pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory):
    output = tmp_path_factory.mktemp("several")
    return tiny_runs.run(pretrained, output, *OPTIONS, train=RECORDS, dev=RECORDS, test=RECORDS)


def test_learns_both_datasets(run) -> None:
    losses = tiny_runs.losses(run.directory)
    assert losses[60] < 0.3 * losses[1]
    metrics = run.evaluations["after"].report.metrics
    for name in ("loss", "perplexity"):
        of_each = [metrics[f"{dataset}.{name}"] for dataset in ("first", "sum")]
        assert metrics[name] == pytest.approx(np.mean(of_each))
    assert max(metrics["first.loss"], metrics["sum.loss"]) < 0.4 * losses[1]


def test_each_dataset_is_best_with_its_own_prefix(run, pretrained) -> None:
    for name, other in (("first", "sum"), ("sum", "first")):
        records = [record for record in RECORDS if record["kind"] == name]
        losses = [
            api.Tuned(pretrained, *run.datasets[dataset])
            .evaluate(own_as(records, dataset))
            .report.metrics["loss"]
            for dataset in (name, other)
        ]
        assert losses[0] < 0.7 * losses[1]


def own_as(records: list[dict[str, str]], dataset: str) -> list[dict[str, str]]:
    return [record | {"kind": dataset} for record in records]


def test_stores_one_prefix_per_dataset_with_its_own_metrics(run) -> None:
    names = {path.name for path in (run.directory / "prefixes").iterdir()}
    assert names == set(run.datasets) == {"first", "sum"}
    assert not (run.directory / "prefix").exists()
    results = json.loads((run.directory / "results.json").read_text())["test"]["after"]["metrics"]
    for name in names:
        produced, card = artifact.load(run.directory / "prefixes" / name)
        assert tiny_runs.bits(produced) == tiny_runs.bits(run.datasets[name][0])
        assert card.metrics["test_loss"] == pytest.approx(results[f"{name}.loss"])
        assert (card.dataset.name, card.dataset.field) == (name, "kind")
        ngrams = artifact.load_ngrams(run.directory / "prefixes" / name)
        assert ngrams is not None
        assert (ngrams.entry_G2W == run.ngrams[name].entry_G2W).all()
    (_, dev) = (line for line in tiny_runs.metrics(run.directory) if line["kind"] == "dev")
    assert dev["loss"] == pytest.approx((dev["first.loss"] + dev["sum.loss"]) / 2)


def test_stored_prefix_evaluates_the_records_of_its_dataset(run, pretrained) -> None:
    for name in ("first", "sum"):
        tuned = api.load_prefix(run.directory / "prefixes" / name, pretrained)
        report = tuned.evaluate(RECORDS).report
        expected = run.evaluations["after"].report.metrics[f"{name}.loss"]
        assert report.examples == len(RECORDS) / 2
        assert report.metrics["loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DataError, match="no record has the dataset 'sum'"):
        tuned.evaluate([record for record in RECORDS if record["kind"] == "first"])


def test_refuses_the_whole_run_as_a_prefix(run, pretrained) -> None:
    with pytest.raises(
        PrefixError, match=r"one prefix per dataset; .*prefixes/first, .*prefixes/sum"
    ):
        api.load_prefix(run.directory, pretrained)
    whole = api.Tuned(pretrained, run.produced, None, run)
    with pytest.raises(PrefixError, match="or one prefix of the bank"):
        whole.generate("1+1=")
    with pytest.raises(PrefixError, match=r"no single prefix to save; .* of 'first', 'sum'"):
        whole.save(run.directory / "whole")
    assert whole.datasets["sum"].card.method["dataset"] == "sum"


def test_second_stage_starts_from_the_first(run, pretrained, tmp_path) -> None:
    parts = safetensors.numpy.load_file(run.directory / "multitask.safetensors")
    shared, cols, rows = (
        parts[name] for name in ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")
    )
    products = shared * (cols @ rows)
    for number, name in enumerate(("first", "sum")):
        np.testing.assert_allclose(
            run.datasets[name][0].x_PD, products[number], rtol=1e-5, atol=1e-6
        )
    second = tiny_runs.run(
        pretrained,
        tmp_path,
        *("method.name=multitask", "method.ranks=2", f"method.source={run.directory}"),
        *("method.source_init=exact", "method.source_task=1", "train.steps=2"),
        "optim.learning_rate=1e-6",
        train=[record for record in RECORDS if record["kind"] == "sum"],
    )
    assert isinstance(second.produced, Embeds)
    np.testing.assert_allclose(second.produced.x_PD, products[1], atol=1e-3)


def test_killed_run_ends_bit_identical(run, pretrained, tmp_path) -> None:
    splits = {"train": RECORDS, "dev": RECORDS, "test": RECORDS}
    with tiny_runs.killed_at(40):
        tiny_runs.run(pretrained, tmp_path, *OPTIONS, **splits)
    again = tiny_runs.run(pretrained, tmp_path, *OPTIONS, **splits)
    assert tiny_runs.outcome(tmp_path) == tiny_runs.outcome(run.directory)
    assert tiny_runs.bits(again.produced) == tiny_runs.bits(run.produced)


@pytest.mark.parametrize(
    ("datasets", "expected"), [(None, ("first", "sum")), (("sum", "first"), ("sum", "first"))]
)
def test_datasets_come_from_the_training_examples_or_the_config(datasets, expected):
    method, sources = told_apart(datasets=datasets)
    assert method.dataset_names == expected
    named = [expected[record.dataset] for record in sources["train"]]
    assert named == [record["kind"] for record in RECORDS]


def told_apart(field: str | None = "kind", records=RECORDS, **fields):
    method = MultitaskPromptTuning(4, **fields)
    return split_mixture(DataConfig(dataset=field), method, {"train": read_records(records)})


@pytest.mark.parametrize(
    ("fields", "change", "error", "message"),
    [
        ({"field": None, "datasets": ("a", "b")}, {}, ConfigError, "set data.dataset to the field"),
        ({"datasets": ("sum",)}, {}, DataError, "unknown dataset 'first' .* are 'sum'"),
        ({"datasets": ("sum", "third")}, {}, ConfigError, "no training example .* 'third'"),
        ({"datasets": ("sum", "sum")}, {}, ConfigError, "appears twice"),
        ({"source": "somewhere"}, {}, ConfigError, "train the datasets one by one"),
        ({}, {"kind": "../up"}, DataError, r"record 1: .*'\.\./up' cannot name a directory"),
        ({}, {"kind": "x" * 300}, DataError, "has 300 bytes, too many for a directory n"),
        ({}, {"kind": "\ud800"}, DataError, "record 1: not valid Unicode text"),
        ({}, {"kind": "FIRST"}, ConfigError, "'FIRST' and 'first' would share a directory"),
        ({}, {"kind": None}, DataError, "record 1: field 'kind' is missing"),
        ({}, {"kind": 1.5}, DataError, "record 1: .* the name of a dataset, got 1.5"),
    ],
)
def test_refuses_what_does_not_fit(fields, change, error, message):
    with pytest.raises(error, match=message):
        told_apart(records=[RECORDS[0] | change, *RECORDS[1:]], **fields)


def test_refuses_a_dataset_field_without_a_multitask_method():
    with pytest.raises(ConfigError, match=r"only method\.name: multitask supports"):
        split_mixture(DataConfig(dataset="kind"), PrefixTuning(4), {"train": read_records(RECORDS)})


def test_datasets_of_an_encoder_share_a_head(tmp_path) -> None:
    encoder = tiny_runs.on_one_device(tiny.write_encoder(tmp_path / "bert"))
    labels = {"praise": ("yes", "no"), "blame": ("no", "yes")}
    records = [
        {"text": f"the film was {word}", "label": label, "kind": kind}
        for kind, pair in labels.items()
        for word, label in zip(("good", "bad"), pair, strict=True)
    ]
    run = tiny_runs.run(
        encoder,
        tmp_path / "run",
        *("method={name: multitask, length: 3}", "data={input: '{text}', dataset: kind}"),
        *("task={name: classify, label: label}", "init.start=text", "train.steps=2"),
        "evaluate.metrics=[loss,accuracy]",
        train=records,
        test=records,
    )
    metrics = run.evaluations["after"].report.metrics
    for name in labels:
        tuned = api.load_prefix(run.directory / "prefixes" / name, encoder)
        report = tuned.evaluate(records, ["loss"]).report
        assert (report.examples, tuned.predict(["good"])[0].prediction in ("yes", "no")) == (
            2,
            True,
        )
        assert report.metrics["loss"] == pytest.approx(metrics[f"{name}.loss"], rel=1e-5)
    assert metrics["praise.loss"] != metrics["blame.loss"]
