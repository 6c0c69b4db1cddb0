"""Run directories, mainly in a bucket with a working copy on disk."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import buckets
import pytest
import tiny_runs
from etils import epath

from prefix_jax.errors import CheckpointError, ConfigError
from prefix_jax.runs.run_directory import RunDirectory

OUTPUT = "gs://bucket/some/run"


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> buckets.FakeBackend:
    monkeypatch.setitem(sys.modules, "gcsfs", sys)
    monkeypatch.chdir(tmp_path)
    return buckets.install(tmp_path / "cloud", monkeypatch)


def stored(tmp_path: Path) -> dict[str, bytes]:
    root = tmp_path / "cloud/bucket/some/run"
    return {
        str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()
    }


def test_local_output_has_no_working_copy(tmp_path: Path) -> None:
    output = RunDirectory(str(tmp_path / "run"))
    assert output.directory == tmp_path / "run"
    assert Path(output.checkpoints) == tmp_path / "run" / "checkpoints"
    output.fetch()
    output.publish()
    assert not output.directory.exists()


def test_fetch_restores_a_run_on_another_machine(cloud, tmp_path: Path) -> None:
    output = RunDirectory(OUTPUT)
    assert output.checkpoints == epath.Path(OUTPUT) / "checkpoints"
    assert output.directory == Path("runs/bucket/some/run")
    output.fetch()
    (output.directory / "prefix").mkdir(parents=True)
    (output.directory / "prefix" / "prefix.json").write_text("{}")
    (output.directory / "metrics.jsonl").write_text("1\n")
    output.publish()
    (output.checkpoints / "3" / "array").write_text("never copied")

    (output.directory / "results.json").write_text("another run")
    RunDirectory(OUTPUT).fetch()
    files = {
        str(f.relative_to(output.directory)) for f in output.directory.rglob("*") if f.is_file()
    }
    assert files == {"prefix/prefix.json", "metrics.jsonl", ".prefix-jax.bucket"}


def test_publish_sends_changed_files_and_deletes_removed_ones(cloud, tmp_path: Path) -> None:
    output = RunDirectory(OUTPUT)
    output.directory.mkdir(parents=True)
    for name in ("loss.png", "predictions.jsonl"):
        (output.directory / name).write_text(name)
    output.publish()
    (tmp_path / "cloud/bucket/some/run/loss.png").write_text("changed in the bucket")
    (output.directory / "predictions.jsonl").unlink()
    (output.directory / "config.yaml").write_text("c")
    output.publish()
    assert stored(tmp_path) == {
        "loss.png": b"changed in the bucket",
        "config.yaml": b"c",
    }


def test_neither_copies_nor_deletes_other_files(cloud, tmp_path: Path) -> None:
    output = RunDirectory(OUTPUT)
    output.fetch()
    (output.directory / "notes.txt").write_text("mine")
    (tmp_path / "cloud/bucket/some/run").mkdir(parents=True)
    (tmp_path / "cloud/bucket/some/run/thesis.tex").write_text("mine")
    (output.directory / "metrics.jsonl").write_text("1\n")
    output.publish()
    RunDirectory(OUTPUT).fetch()
    assert (output.directory / "notes.txt").read_text() == "mine"
    assert set(stored(tmp_path)) == {"metrics.jsonl", "thesis.tex"}
    assert not (output.directory / "thesis.tex").exists()


def test_bucket_keeps_metrics_that_are_lost_on_disk(cloud, tmp_path: Path) -> None:
    output = RunDirectory(OUTPUT)
    output.fetch()
    (output.directory / "metrics.jsonl").write_text("1\n")
    output.publish()
    (output.directory / "metrics.jsonl").unlink()
    output.publish()
    shutil.rmtree(output.directory)
    with pytest.raises(CheckpointError, match=r"working copy .* was removed"):
        output.publish()
    assert stored(tmp_path) == {"metrics.jsonl": b"1\n"}


@pytest.mark.parametrize("path", ["../../precious", "a/../../../precious", "../precious", "a/./b"])
def test_refuses_bucket_paths_outside_the_working_copies(cloud, tmp_path: Path, path: str) -> None:
    thesis = tmp_path / "precious" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    (tmp_path / "runs" / "bucket" / "a").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"cannot be a part of gs://BUCKET/PATH"):
        RunDirectory(f"gs://bucket/{path}").fetch()
    assert thesis.read_text() == "mine"


@pytest.mark.parametrize(
    "output", ["gs://../x", "gs://bucket/run[1]", "gs://bucket/*", "gs://bucket/a//b"]
)
def test_refuses_names_with_a_special_meaning(output: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be a part of gs://BUCKET/PATH"):
        RunDirectory(output)


def test_refuses_a_local_directory_as_working_copy(cloud, tmp_path: Path) -> None:
    copy = tmp_path / "runs" / "bucket" / "some" / "run"
    (copy / "prefix").mkdir(parents=True)
    (copy / "metrics.jsonl").write_text("local")
    with pytest.raises(ConfigError, match=r"is not a working copy, .* would replace its files"):
        RunDirectory(OUTPUT).fetch()
    (copy / ".prefix-jax.bucket").write_text("gs://other/run\n")
    with pytest.raises(ConfigError, match=r"is the working copy of gs://other/run"):
        RunDirectory(OUTPUT).fetch()
    assert (copy / "metrics.jsonl").read_text() == "local"


def test_refuses_a_bucket_with_checkpoints_of_another_program(
    cloud, tiny_model_dir: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "cloud/bucket/some/run/checkpoints/100/state"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("arrays")
    with pytest.raises(ConfigError, match=r"checkpoints in it would be replaced"):
        tiny_runs.run(tiny_runs.on_one_device(tiny_model_dir), OUTPUT)
    assert foreign.read_text() == "arrays"


def test_publishes_results_last(cloud, tmp_path: Path, monkeypatch) -> None:
    sent: list[str] = []
    opened = buckets.FakeBackend.open

    def recording(self, path, mode):
        if "w" in mode:
            sent.append(Path(path).name)
        return opened(self, path, mode)

    monkeypatch.setattr(buckets.FakeBackend, "open", recording)
    output = RunDirectory(OUTPUT)
    output.directory.mkdir(parents=True)
    for name in ("results.json", "loss.png", "predictions.jsonl"):
        (output.directory / name).write_text(name)
    output.publish()
    assert sent == ["loss.png", "predictions.jsonl", "results.json"]


def test_bucket_error_says_what_to_check(cloud) -> None:
    output = RunDirectory(OUTPUT)
    output.directory.mkdir(parents=True)
    (output.directory / "loss.png").write_text("a")
    cloud.failure = RuntimeError("403 Forbidden\nmore")
    with pytest.raises(
        CheckpointError, match=r"cannot write .*403 Forbidden; check that the bucket"
    ):
        output.publish()


def test_unreadable_bucket_keeps_the_working_copy(cloud) -> None:
    output = RunDirectory(OUTPUT)
    output.fetch()
    (output.directory / "metrics.jsonl").write_text("1\n")
    output.publish()
    cloud.failure = RuntimeError("503 Unavailable")
    with pytest.raises(CheckpointError, match=r"cannot read .*503 Unavailable"):
        RunDirectory(OUTPUT).fetch()
    assert (output.directory / "metrics.jsonl").read_text() == "1\n"


def test_bucket_requires_another_package(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"pip install 'prefix-jax\[gcs\]'"):
        RunDirectory(OUTPUT)


@pytest.mark.parametrize("output", ["gs://", "gs://bucket", "gs://bucket/", "gs://bucket//"])
def test_refuses_a_whole_bucket(output: str) -> None:
    """Its working copy would contain the working copies of other runs."""
    with pytest.raises(ConfigError, match="gs://BUCKET/PATH"):
        RunDirectory(output)


def test_refuses_other_schemes() -> None:
    with pytest.raises(ConfigError, match="gs://BUCKET/PATH"):
        RunDirectory("s3://bucket/run")


@pytest.mark.parametrize("output", ["gs:/bucket/run", "runs/gs:/bucket", "s3:/bucket/run"])
def test_refuses_an_address_with_one_slash(output: str) -> None:
    with pytest.raises(ConfigError, match="gs://BUCKET/PATH"):
        RunDirectory(output)


def test_names_the_target_of_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("missing")
    with (
        pytest.raises(ConfigError, match="a symbolic link to missing, which does not exist"),
        RunDirectory(str(tmp_path / "link")).locked(),
    ):
        pass


def test_run_resumed_on_another_machine_is_bit_identical(
    cloud, tiny_model_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    """The checkpoints are on disk, because TensorStore cannot use the fake bucket.

    For a real bucket or an emulator, see docs/tpu.md.
    """
    checkpoints = tmp_path / "checkpoints"
    monkeypatch.setattr(RunDirectory, "checkpoints", property(lambda _: epath.Path(checkpoints)))
    pretrained = tiny_runs.on_one_device(tiny_model_dir)
    with tiny_runs.killed_at(7):
        tiny_runs.run(pretrained, OUTPUT)
    (tmp_path / "runs").rename(tmp_path / "lost")
    tiny_runs.run(pretrained, OUTPUT)
    assert "results.json" in stored(tmp_path)
    moved = checkpoints.rename(tmp_path / "runs/bucket/some/run/checkpoints").parent
    checkpoints = tmp_path / "whole" / "checkpoints"
    tiny_runs.run(pretrained, str(tmp_path / "whole"))
    before, after = tiny_runs.outcome(moved), tiny_runs.outcome(tmp_path / "whole")
    assert before == after


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("~nosuchuser/x", "output_dir ~nosuchuser/x: cannot expand ~"),
        ("x" * 300, "cannot be used as a path (File name too long)"),
        ("a\0b", "null byte"),
    ],
)
def test_refuses_an_output_that_cannot_be_a_path(output: str, message: str):
    with pytest.raises(ConfigError) as caught:
        RunDirectory(output)
    assert message in str(caught.value)


def test_expands_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDirectory("~/runs/a").directory == tmp_path / "runs" / "a"
