"""One run owns its output directory, and survives a full disk and foreign files there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from etils import epath

from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
)
from prefix_jax.runs import checkpoint_store as shelf
from prefix_jax.runs.console import Console
from prefix_jax.runs.metric_writer import MetricWriter


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
