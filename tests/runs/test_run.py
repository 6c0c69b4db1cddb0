"""Whole runs: what they select, measure and leave, and how they refuse bad input."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_runs
from etils import epath

from prefix_jax import artifact
from prefix_jax import config as configs
from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.data.pipeline import Pipeline
from prefix_jax.errors import (
    CheckpointError,
    ConfigError,
    ContextError,
    DataError,
    MeshError,
    NonFiniteError,
    PrefixJaxError,
)
from prefix_jax.evaluate.run import Evaluator
from prefix_jax.mesh import make_mesh
from prefix_jax.runs import checkpoint_store as shelf
from prefix_jax.runs.console import Report
from prefix_jax.runs.run import fit


@pytest.fixture(scope="module")
def pretrained(tiny_model_dir: Path) -> Pretrained:
    return tiny_runs.on_one_device(tiny_model_dir)


@pytest.fixture(scope="module")
def whole(pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the default options that keeps every checkpoint."""
    directory = tmp_path_factory.mktemp("whole")
    tiny_runs.run(pretrained, directory, "train.keep_checkpoints=9")
    return directory


# --- What a run leaves -----------------------------------------------------------------------


def test_a_run_leaves_its_prefix_its_scores_and_its_predictions(
    pretrained: Pretrained, tmp_path: Path
) -> None:
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
    for name, found in run.evaluations.items():
        assert results["test"][name]["metrics"] == pytest.approx(dict(found.report.metrics))
        assert set(found.report.metrics) == {"loss", "perplexity", "chrf"}
    before, after = (results["test"][name]["metrics"] for name in ("before", "after"))
    assert after["loss"] < before["loss"]

    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    assert [made["prompt"] for made in predictions] == [r["sum"] + "=" for r in tiny_runs.SOME]
    assert [made["references"] for made in predictions] == [[r["total"]] for r in tiny_runs.SOME]
    assert [made["source"] for made in predictions] == [f"record {i}" for i in range(1, 5)]

    produced, card = artifact.load(tmp_path)
    assert tiny_runs.bits(produced) == tiny_runs.bits(run.produced)
    assert card.metrics["test_loss"] == pytest.approx(after["loss"])
    assert (card.steps, card.template.input) == (12, "{sum}=")
    # During training the first metric alone is measured.
    (dev, last) = (line for line in tiny_runs.metrics(tmp_path) if line["kind"] == "dev")
    assert (dev["step"], last["step"]) == (6, 12)
    assert set(dev) == {"step", "kind", "loss", "perplexity"}
    assert last["loss"] < dev["loss"] < before["loss"]
    assert "256 trained (prefix); 20 training examples, 12 steps of 4" in tiny_runs.shown(console)


def test_only_records_of_which_text_is_measured_need_references(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    referenced = [{**record, "refs": [record["total"], "7"]} for record in tiny_runs.SOME]
    options = ("data.references=refs", "evaluate.metrics=[loss,exact_match]", "train.steps=1")
    run = tiny_runs.run(pretrained, tmp_path / "a", *options, dev=tiny_runs.SOME, test=referenced)
    made = run.evaluations["after"].predictions
    assert [list(prediction.references) for prediction in made] == [r["refs"] for r in referenced]
    with pytest.raises(DataError, match="record 1: no field 'refs'"):
        tiny_runs.run(pretrained, tmp_path / "b", *options, test=tiny_runs.SOME)
    options = (*options, "evaluate.metrics=[exact_match]")
    with pytest.raises(DataError, match="record 1: no field 'refs'"):
        tiny_runs.run(pretrained, tmp_path / "b", *options, dev=tiny_runs.SOME)


def test_the_best_step_is_exported_and_training_stops_early(
    pretrained: Pretrained, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    measured = iter([5.0, 3.0, 4.0, 3.5, 2.0])  # after steps 2, 4, 6, 8, and on test
    monkeypatch.setattr(Evaluator, "loss", lambda *_: next(measured))
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
    # The best one stays on disk beside the latest.
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "8"]
    key = "['train']['prefix']['decoder']['k_LPKH']"
    stored = tiny_runs.state(tmp_path, 4)[key]
    produced, _ = artifact.load(tmp_path)
    assert np.asarray(produced.decoder.inside.k_LPKH).tobytes() == stored[2]
    assert tiny_runs.state(tmp_path, 8)[key] != stored

    # Started again, it measures the same prefix, and trains no further.
    measured = iter([2.0])
    again = tiny_runs.run(pretrained, tmp_path, *options, **splits)
    assert again.step == 4
    assert tiny_runs.bits(again.produced) == tiny_runs.bits(run.produced)


def test_generated_text_may_select(pretrained: Pretrained, tmp_path: Path, monkeypatch) -> None:
    answers = iter([["00"] * 4, ["02", "03", "04", "00"], ["02"] + ["00"] * 3])
    seen = []

    def generate(evaluator: Evaluator, params: Any, *_: Any) -> list[str]:
        real = unpatched(evaluator, params, *_)  # weights in either form will do
        seen.append((isinstance(params["layers"], tuple), len(real)))
        return next(answers)

    unpatched = Evaluator._generate
    monkeypatch.setattr(Evaluator, "_generate", generate)
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


def test_full_fine_tuning_is_the_same_run_without_a_prefix(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    before = tiny_runs.bits(pretrained.stacked())
    options = ("method=full", "optim.learning_rate=1e-3", "evaluate.compare_baseline=true")
    run = tiny_runs.run(pretrained, tmp_path, *options, test=tiny_runs.SOME)
    losses = {name: found.report.metrics["loss"] for name, found in run.evaluations.items()}
    assert losses["after"] < losses["before"]
    assert (run.produced, run.card) == (None, None)
    assert not (tmp_path / "prefix").exists()
    # The weights that were given are untouched; the new ones are another backbone.
    assert tiny_runs.bits(pretrained.stacked()) == before
    assert run.pretrained.fingerprint != pretrained.fingerprint
    assert run.pretrained.tokenizer is pretrained.tokenizer


def test_examples_that_were_cut_or_dropped_are_told(pretrained: Pretrained, tmp_path: Path) -> None:
    console = tiny_runs.console()
    long = {"sum": "1" * 30, "total": "00"}, {"sum": "1+1", "total": "0" * 30}
    options = ("data.max_length=12", "data.on_overflow=drop", "train.steps=1")
    train = [*tiny_runs.RECORDS, *long]
    tiny_runs.run(pretrained, tmp_path, *options, train=train, console=console)
    assert "train: 1 of 22 examples were cut to fit (first: record 21)" in tiny_runs.shown(console)
    assert "train: 1 of 22 examples were dropped (first: record 22)" in tiny_runs.shown(console)


# --- A loss that is not finite ---------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_in_the_state_before_and_names_the_batch(
    pretrained: Pretrained, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    batch = Pipeline.batch

    def poisoned(self: Pipeline, step: int) -> Any:
        made = batch(self, step)
        weight_BM = np.where(made.weight_BM > 0, np.float32(np.inf), np.float32(0))
        return made.replace(weight_BM=weight_BM) if step == 7 else made

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "batch", poisoned)
        with pytest.raises(NonFiniteError) as raised:
            tiny_runs.run(pretrained, tmp_path, "train.keep_checkpoints=9")
    message = str(raised.value)
    assert message.startswith("step 8: loss nan")
    assert message.count("record ") == 4
    assert "optim.learning_rate" in message
    # The step after it was on its way already, and changed nothing.
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [3, 6, 7]
    tiny_runs.run(pretrained, tmp_path, "train.keep_checkpoints=9")
    found, expected = tiny_runs.outcome(tmp_path), tiny_runs.outcome(whole)
    found["checkpoints"].remove(7)
    assert found == expected


def test_a_loss_that_is_not_finite_at_the_first_step_is_not_blamed_on_the_learning_rate(
    pretrained: Pretrained, tmp_path: Path, monkeypatch
) -> None:
    batch = Pipeline.batch
    monkeypatch.setattr(
        Pipeline, "batch", lambda self, step: (b := batch(self, step)).replace(
            weight_BM=np.where(b.weight_BM > 0, np.float32(np.inf), np.float32(0))
        )
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="a lower learning rate will not help") as raised:
        tiny_runs.run(pretrained, tmp_path, "train.steps=1")
    assert str(raised.value).startswith("step 1: loss nan")
    assert "model's weights or config.json" in str(raised.value)


def test_a_learning_rate_that_is_too_high_is_an_error_too(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    options = (
        "optim.learning_rate=1e30",
        "optim.weight_decay=1e30",
        "optim.clip_norm=null",
        "optim.warmup_steps=0",
    )
    with pytest.raises(NonFiniteError, match=r"lower optim\.learning_rate"):
        tiny_runs.run(pretrained, tmp_path, *options)
    assert not (tmp_path / "prefix").exists()


# --- Bad input -------------------------------------------------------------------------------

JSONL = '{"sum": "1+1", "total": "02"}\n'


@dataclasses.dataclass(frozen=True)
class Bad:
    """What is wrong with a run, and what it is told."""

    error: type[PrefixJaxError]
    parts: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    train: list[dict[str, Any]] | None = dataclasses.field(
        default_factory=lambda: tiny_runs.RECORDS
    )
    file: str | None = None


BAD = {
    "missing field": Bad(
        DataError,
        ("record 1: no field 'summ' (did you mean 'sum'?)", "'sum', 'total'"),
        ("data.input={summ}",),
    ),
    "no records": Bad(DataError, ("the records: no records",), train=[]),
    "empty file": Bad(DataError, ("train.jsonl: no records",), file="\n"),
    "malformed line": Bad(
        DataError, ("train.jsonl:3: malformed JSON",), file=2 * JSONL + '{"sum": \n' + JSONL
    ),
    "NaN label": Bad(
        DataError,
        ("record 2: field 'total' is NaN",),
        train=[{"sum": "1", "total": 2.0}, {"sum": "1", "total": float("nan")}],
    ),
    "longer than the context": Bad(
        DataError,
        ("record 1", "max_length 252"),
        train=[{"sum": "1+1", "total": "0" * 260}],
    ),
    "target that vanishes": Bad(
        DataError, ("record 1", "max_length 3", "on_overflow: drop"), ("data.max_length=3",)
    ),
    "all dropped": Bad(
        DataError,
        ("all 20 examples exceed max_length 3",),
        ("data.max_length=3", "data.on_overflow=drop"),
    ),
    "text beyond the positions": Bad(
        ContextError, ("data.max_length 253", "256 positions", "252"), ("data.max_length=253",)
    ),
    "prefix beyond the positions": Bad(
        ContextError, ("position 300", "256 positions", "shorter prefix"), ("method.length=300",)
    ),
    "text moved beyond the positions": Bad(
        ContextError, ("position 256", "256 positions"), ("method.text_position=256",)
    ),
    "negative text position": Bad(
        ConfigError, ("method.text_position: must be at least 0",), ("method.text_position=-1",)
    ),
    "unknown method": Bad(ConfigError, ("'prompts'", "'prompt'"), ("method=prompts",)),
    "no data": Bad(ConfigError, ("data.train",), train=None),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_bad_input_is_told_before_anything_is_written(
    pretrained: Pretrained, tmp_path: Path, bad: Bad
) -> None:
    overrides = list(bad.overrides)
    if bad.file is not None:
        (tmp_path / "train.jsonl").write_text(bad.file)
        overrides.append(f"data.train={tmp_path / 'train.jsonl'}")
    train = None if bad.file is not None else bad.train
    with pytest.raises(bad.error) as raised:
        tiny_runs.run(pretrained, tmp_path / "run", *overrides, train=train)
    for part in bad.parts:
        assert part in str(raised.value)
    # So the same directory is free for the corrected command.
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [("data.train=nowhere.jsonl", "no such file"), ("data.input={facts}", "no field 'facts'")],
)
def test_a_mistake_in_the_data_is_told_before_the_backbone_is_loaded(
    tmp_path: Path, override: str, message: str
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"sum": "1+1", "total": "2"}\n')
    config = configs.parse(
        {
            "model": {"path": str(tmp_path / "no model")},
            "data": {"train": str(path), "input": "{sum}", "target": "{total}"},
            "train": {"steps": 1},
            "output_dir": str(tmp_path / "run"),
        },
        [override],
    )
    with pytest.raises(DataError, match=message):
        fit(config, quiet=True)


def test_a_batch_that_does_not_divide_over_the_mesh_is_an_error(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    everywhere = load(tiny_model_dir, mesh=make_mesh(8, 1, 1))
    with pytest.raises(MeshError, match=r"batch_size 4 .* 8 batch shards .* multiple of 8"):
        tiny_runs.run(everywhere, tmp_path)
    assert jax.device_count() == 8


def full_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    seal = shelf._seal

    def full(path: epath.Path) -> None:
        if int(path.stem) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        seal(path)

    monkeypatch.setattr(shelf, "_seal", full)


def full_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefix_jax.runs.metric_writer import MetricWriter

    write = MetricWriter.write

    def full(self: MetricWriter, step: int, *rest: Any) -> None:
        if step > 8:
            raise CheckpointError("cannot write metrics.jsonl: No space left on device")
        write(self, step, *rest)

    monkeypatch.setattr(MetricWriter, "write", full)


@pytest.mark.parametrize("fill", [full_checkpoints, full_metrics])
def test_a_full_disk_stops_a_run_that_goes_on_once_there_is_room(
    pretrained: Pretrained,
    whole: Path,
    tmp_path: Path,
    monkeypatch,
    fill: Callable[[pytest.MonkeyPatch], None],
) -> None:
    with monkeypatch.context() as patch:
        fill(patch)
        with pytest.raises(CheckpointError, match="No space left on device"):
            tiny_runs.run(pretrained, tmp_path, "train.keep_checkpoints=9")
    assert (tmp_path / "checkpoints" / "3").is_dir()
    tiny_runs.run(pretrained, tmp_path, "train.keep_checkpoints=9")
    assert tiny_runs.outcome(tmp_path) == tiny_runs.outcome(whole)


def test_a_run_directory_that_cannot_be_written_is_an_error(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        tiny_runs.run(pretrained, tmp_path / "file" / "run")


def test_full_fine_tuning_refuses_weights_that_small_updates_would_not_move(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    narrow = load(tiny_model_dir, dtype="bfloat16", mesh=make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(ConfigError, match=r"model\.dtype: float32"):
        tiny_runs.run(narrow, tmp_path, "method=full")


def test_a_file_that_is_not_of_a_run_is_not_replaced(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    own = tmp_path / "config.yaml"
    own.write_text("# mine\nmodel: {path: m}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml was not written by a run"):
        tiny_runs.run(pretrained, tmp_path)
    assert own.read_text().startswith("# mine")
    with pytest.raises(ConfigError, match=r"config\.yaml is a file"):
        tiny_runs.run(pretrained, own)
    # What another program wrote, or a run elsewhere: a second stage may start from its parts.
    for name in ("metrics.jsonl", "predictions-before.jsonl", "multitask.safetensors"):
        own = own.rename(tmp_path / name)
        with pytest.raises(ConfigError, match=f"not written by a run, and {name} in it would"):
            tiny_runs.run(pretrained, tmp_path)
        assert own.read_text().startswith("# mine")


# --- One run in a directory ------------------------------------------------------------------


def test_a_second_run_is_refused_before_it_writes_anything(
    pretrained: Pretrained, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    record, refused = Report.step, []

    def step(self: Report, done: int, *rest: Any) -> None:
        record(self, done, *rest)
        if done == 4:
            with pytest.raises(ConfigError, match="another run is writing there") as raised:
                tiny_runs.run(pretrained, tmp_path, "train.keep_checkpoints=9")
            refused.append(raised.value)

    with monkeypatch.context() as patch:
        patch.setattr(Report, "step", step)
        tiny_runs.run(pretrained, tmp_path, "train.keep_checkpoints=9")
    assert len(refused) == 1
    assert not list(tmp_path.glob(".prefix-jax*"))
    assert tiny_runs.outcome(tmp_path) == tiny_runs.outcome(whole)


def test_a_run_releases_its_directory_however_it_ends(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    with tiny_runs.killed_at(4):
        tiny_runs.run(pretrained, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run with another"):
        tiny_runs.run(pretrained, tmp_path / "run", "optim.learning_rate=0.5")
    with pytest.raises(DataError):
        tiny_runs.run(pretrained, tmp_path / "new" / "run", train=[{"another": "field"}])
    assert not (tmp_path / "new").exists()
    assert tiny_runs.run(pretrained, tmp_path / "run").step == 12


@pytest.mark.parametrize("lost", ["metrics.jsonl", "."])
def test_files_that_are_removed_while_a_run_writes_them_stop_it_at_once(
    pretrained: Pretrained, tmp_path: Path, monkeypatch, lost: str
) -> None:
    record, steps = Report.step, []
    seldom = "train.checkpoint_every=4" if lost == "metrics.jsonl" else "train.checkpoint_every=100"

    def step(self: Report, done: int, *rest: Any) -> None:
        if done == 5:
            (tmp_path / "run" / lost).resolve().rename(tmp_path / "moved")
        steps.append(done)
        record(self, done, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Report, "step", step)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl was removed or replaced while"):
            tiny_runs.run(pretrained, tmp_path / "run", seldom)
    assert steps[-1] == 5
    assert tiny_runs.run(pretrained, tmp_path / "run", seldom).step == 12


def test_a_damaged_best_checkpoint_is_replaced_by_the_last_with_a_warning(
    pretrained: Pretrained, tmp_path: Path, monkeypatch
) -> None:
    measured = iter([1.0, *[5.0] * 20])
    monkeypatch.setattr(Evaluator, "loss", lambda *_: next(measured))
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
        "warning: storing the prefix of step 12, the last one, instead of the best on dev "
        "(step 6): checkpoint" in tiny_runs.shown(console)
    )
    key = "['train']['prefix']['decoder']['k_LPKH']"
    produced, _ = artifact.load(tmp_path)
    assert (
        np.asarray(produced.decoder.inside.k_LPKH).tobytes()
        == (tiny_runs.state(tmp_path, 12)[key][2])
    )


@pytest.mark.parametrize("spoil", ["latin-1", "directory", "dangling link"])
def test_an_unreadable_config_of_an_output_is_an_error(
    pretrained: Pretrained, tmp_path: Path, spoil: str
) -> None:
    path = tmp_path / "config.yaml"
    if spoil == "latin-1":
        path.write_bytes("# é".encode("latin-1"))
    elif spoil == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"does not hold a run to resume: .*config\.yaml"):
        tiny_runs.run(pretrained, tmp_path)
    assert os.path.lexists(path)


def test_stray_files_in_a_run_do_not_hinder_it(
    pretrained: Pretrained, whole: Path, tmp_path: Path
) -> None:
    with tiny_runs.killed_at(8):
        tiny_runs.run(pretrained, tmp_path, "train.keep_checkpoints=9")
    strays = [
        path / ".DS_Store"
        for path in (tmp_path, tmp_path / "checkpoints", *tmp_path.glob("checkpoints/*"))
    ]
    for stray in strays:
        stray.write_text("")
    (tmp_path / "checkpoints" / "0999").mkdir()
    (tmp_path / "checkpoints" / "999").symlink_to(tmp_path / "nowhere")
    console = tiny_runs.console()
    tiny_runs.run(pretrained, tmp_path, "train.keep_checkpoints=9", console=console)
    assert "continuing after step 6" in tiny_runs.shown(console)
    assert "warning" not in tiny_runs.shown(console)
    assert all(stray.exists() for stray in strays)
    assert tiny_runs.state(tmp_path, 12) == tiny_runs.state(whole, 12)


def test_longer_training_of_an_ended_run_is_told_to_start_from_its_prefix(
    pretrained: Pretrained, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        tiny_runs.run(pretrained, whole, "train.keep_checkpoints=9", "train.steps=20")
    settings = f"init.start=prefix init.path={whole}"
    assert settings in str(raised.value)
    run = tiny_runs.run(pretrained, tmp_path, "train.steps=1", *settings.split())
    assert run.step == 1
