"""Complete runs: selection, results, outputs and refused inputs."""

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
from prefix_jax.evaluate.predictor import Predictor
from prefix_jax.mesh import make_mesh
from prefix_jax.runs import checkpoint_store as shelf
from prefix_jax.runs.console import Console
from prefix_jax.runs.metric_writer import MetricWriter
from prefix_jax.runs.run import run


@pytest.fixture(scope="module")
def pretrained(tiny_model_dir: Path) -> Pretrained:
    return tiny_runs.on_one_device(tiny_model_dir)


@pytest.fixture(scope="module")
def whole(pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with default options that keeps every checkpoint."""
    directory = tmp_path_factory.mktemp("whole")
    tiny_runs.run(pretrained, directory, "train.keep_checkpoints=9")
    return directory


# --- Outputs ---------------------------------------------------------------------------------


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


# --- Nonfinite losses ------------------------------------------------------------------------


def test_nonfinite_loss_stops_in_the_state_before_it_and_names_the_batch(
    pretrained: Pretrained, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    batch = Pipeline.batch

    def poisoned(self: Pipeline, step: int) -> Any:
        original = batch(self, step)
        weight_BM = np.where(original.weight_BM > 0, np.float32(np.inf), np.float32(0))
        return original.replace(weight_BM=weight_BM) if step == 7 else original

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "batch", poisoned)
        with pytest.raises(NonFiniteError) as raised:
            tiny_runs.run(pretrained, tmp_path, "train.keep_checkpoints=9")
    message = str(raised.value)
    assert message.startswith("step 8: loss nan")
    assert message.count("record ") == 4
    assert "optim.learning_rate" in message
    # The next step was already running, and changed nothing.
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [3, 6, 7]
    tiny_runs.run(pretrained, tmp_path, "train.keep_checkpoints=9")
    outcome, expected = tiny_runs.outcome(tmp_path), tiny_runs.outcome(whole)
    outcome["checkpoints"].remove(7)
    assert outcome == expected


def test_nonfinite_loss_at_the_first_step_is_not_blamed_on_the_learning_rate(
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


def test_diverging_learning_rate_is_an_error(pretrained: Pretrained, tmp_path: Path) -> None:
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
    """An invalid run and the parts of its error message."""

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
        ConfigError,
        ("method.text_position: must be a non-negative integer",),
        ("method.text_position=-1",),
    ),
    "unknown method": Bad(ConfigError, ("'prompts'", "'prompt'"), ("method=prompts",)),
    "no data": Bad(ConfigError, ("data.train",), train=None),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_refuses_bad_input_before_writing_anything(
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
    # The directory is free for the corrected command.
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [("data.train=nowhere.jsonl", "no such file"), ("data.input={facts}", "no field 'facts'")],
)
def test_finds_mistakes_in_the_data_before_loading_the_backbone(
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
        run(config, quiet=True)


def test_refuses_a_batch_size_that_the_mesh_does_not_divide(
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
    write = MetricWriter.write

    def full(self: MetricWriter, step: int, *rest: Any) -> None:
        if step > 8:
            raise CheckpointError("cannot write metrics.jsonl: No space left on device")
        write(self, step, *rest)

    monkeypatch.setattr(MetricWriter, "write", full)


@pytest.mark.parametrize("fill", [full_checkpoints, full_metrics])
def test_full_disk_is_reported_and_resumable(
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


def test_unwritable_run_directory_is_an_error(pretrained: Pretrained, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        tiny_runs.run(pretrained, tmp_path / "file" / "run")


def test_full_fine_tuning_requires_float32_weights(tiny_model_dir: Path, tmp_path: Path) -> None:
    narrow = load(tiny_model_dir, dtype="bfloat16", mesh=make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(ConfigError, match=r"model\.dtype: float32"):
        tiny_runs.run(narrow, tmp_path, "method=full")


def test_never_replaces_files_that_no_run_wrote(pretrained: Pretrained, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("# mine\nmodel: {path: m}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml was not written by a run"):
        tiny_runs.run(pretrained, tmp_path)
    assert file.read_text().startswith("# mine")
    with pytest.raises(ConfigError, match=r"config\.yaml is a file"):
        tiny_runs.run(pretrained, file)
    # Files of another program, or of another run from which a second stage may start.
    for name in ("metrics.jsonl", "predictions-before.jsonl", "multitask.safetensors"):
        file = file.rename(tmp_path / name)
        with pytest.raises(ConfigError, match=f"not written by a run, and {name} in it would"):
            tiny_runs.run(pretrained, tmp_path)
        assert file.read_text().startswith("# mine")


# --- One run in a directory ------------------------------------------------------------------


def test_refuses_a_second_run_before_it_writes_anything(
    pretrained: Pretrained, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    on_metrics, refused = Console.on_metrics, []

    def starting_another(self: Console, step: int, *rest: Any) -> bool:
        if step == 4:
            with pytest.raises(ConfigError, match="another run is writing there") as raised:
                tiny_runs.run(pretrained, tmp_path, "train.keep_checkpoints=9")
            refused.append(raised.value)
        return on_metrics(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Console, "on_metrics", starting_another)
        tiny_runs.run(pretrained, tmp_path, "train.keep_checkpoints=9")
    assert len(refused) == 1
    assert not list(tmp_path.glob(".prefix-jax*"))
    assert tiny_runs.outcome(tmp_path) == tiny_runs.outcome(whole)


def test_releases_its_directory_after_any_end(pretrained: Pretrained, tmp_path: Path) -> None:
    with tiny_runs.killed_at(4):
        tiny_runs.run(pretrained, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run with another"):
        tiny_runs.run(pretrained, tmp_path / "run", "optim.learning_rate=0.5")
    with pytest.raises(DataError):
        tiny_runs.run(pretrained, tmp_path / "new" / "run", train=[{"another": "field"}])
    assert not (tmp_path / "new").exists()
    assert tiny_runs.run(pretrained, tmp_path / "run").step == 12


@pytest.mark.parametrize("lost", ["metrics.jsonl", "."])
def test_stops_at_once_if_its_files_are_removed(
    pretrained: Pretrained, tmp_path: Path, monkeypatch, lost: str
) -> None:
    on_metrics, steps = MetricWriter.on_metrics, []
    seldom = "train.checkpoint_every=4" if lost == "metrics.jsonl" else "train.checkpoint_every=100"

    def removing(self: MetricWriter, step: int, *rest: Any) -> bool:
        if step == 5:
            (tmp_path / "run" / lost).resolve().rename(tmp_path / "moved")
        steps.append(step)
        return on_metrics(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "on_metrics", removing)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl was removed or replaced during"):
            tiny_runs.run(pretrained, tmp_path / "run", seldom)
    assert steps[-1] == 5
    assert tiny_runs.run(pretrained, tmp_path / "run", seldom).step == 12


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


@pytest.mark.parametrize("spoil", ["latin-1", "directory", "dangling link"])
def test_unreadable_config_in_the_output_is_an_error(
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


def test_ignores_and_keeps_stray_files(pretrained: Pretrained, whole: Path, tmp_path: Path) -> None:
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
    assert "resuming after step 6" in tiny_runs.shown(console)
    assert "warning" not in tiny_runs.shown(console)
    assert all(stray.exists() for stray in strays)
    assert tiny_runs.state(tmp_path, 12) == tiny_runs.state(whole, 12)


def test_lengthening_a_finished_run_suggests_starting_from_its_prefix(
    pretrained: Pretrained, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        tiny_runs.run(pretrained, whole, "train.keep_checkpoints=9", "train.steps=20")
    settings = f"init.start=prefix init.path={whole}"
    assert settings in str(raised.value)
    run = tiny_runs.run(pretrained, tmp_path, "train.steps=1", *settings.split())
    assert run.step == 1
