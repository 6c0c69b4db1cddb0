"""A run in a bucket: what is recorded goes there, and comes back to a machine that has nothing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import buckets
import pytest
import tiny_runs
from etils import epath

from prefix_jax.errors import CheckpointError, ConfigError
from prefix_jax.runs import run as fitting
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


def test_a_directory_is_its_own_place(tmp_path: Path) -> None:
    place = RunDirectory(str(tmp_path / "run"))
    assert place.directory == tmp_path / "run"
    assert Path(place.checkpoints) == tmp_path / "run" / "checkpoints"
    place.fetch()
    place.publish()
    assert not place.directory.exists()


def test_a_run_comes_back_to_another_machine(cloud, tmp_path: Path) -> None:
    place = RunDirectory(OUTPUT)
    assert place.checkpoints == epath.Path(OUTPUT) / "checkpoints"
    assert place.directory == Path("runs/bucket/some/run")
    place.fetch()
    (place.directory / "prefix").mkdir(parents=True)
    (place.directory / "prefix" / "prefix.json").write_text("{}")
    (place.directory / "metrics.jsonl").write_text("1\n")
    place.publish()
    (place.checkpoints / "3" / "array").write_text("not to be copied")

    (place.directory / "results.json").write_text("of another run")
    RunDirectory(OUTPUT).fetch()
    found = {str(f.relative_to(place.directory)) for f in place.directory.rglob("*") if f.is_file()}
    assert found == {"prefix/prefix.json", "metrics.jsonl", ".prefix-jax.bucket"}


def test_only_what_has_changed_is_sent_and_what_is_gone_goes(cloud, tmp_path: Path) -> None:
    place = RunDirectory(OUTPUT)
    place.directory.mkdir(parents=True)
    for name in ("loss.png", "predictions.jsonl"):
        (place.directory / name).write_text(name)
    place.publish()
    (tmp_path / "cloud/bucket/some/run/loss.png").write_text("seen whether it is sent again")
    (place.directory / "predictions.jsonl").unlink()
    (place.directory / "config.yaml").write_text("c")
    place.publish()
    assert stored(tmp_path) == {
        "loss.png": b"seen whether it is sent again",
        "config.yaml": b"c",
    }


def test_files_that_no_run_writes_stay_where_they_are(cloud, tmp_path: Path) -> None:
    place = RunDirectory(OUTPUT)
    place.fetch()
    (place.directory / "notes.txt").write_text("mine")
    (tmp_path / "cloud/bucket/some/run").mkdir(parents=True)
    (tmp_path / "cloud/bucket/some/run/thesis.tex").write_text("mine")
    (place.directory / "metrics.jsonl").write_text("1\n")
    place.publish()
    RunDirectory(OUTPUT).fetch()
    assert (place.directory / "notes.txt").read_text() == "mine"
    assert set(stored(tmp_path)) == {"metrics.jsonl", "thesis.tex"}
    assert not (place.directory / "thesis.tex").exists()


def test_metrics_lost_on_disk_stay_in_the_bucket(cloud, tmp_path: Path) -> None:
    place = RunDirectory(OUTPUT)
    place.fetch()
    (place.directory / "metrics.jsonl").write_text("1\n")
    place.publish()
    (place.directory / "metrics.jsonl").unlink()
    place.publish()
    shutil.rmtree(place.directory)
    with pytest.raises(CheckpointError, match=r"working copy .* was removed"):
        place.publish()
    assert stored(tmp_path) == {"metrics.jsonl": b"1\n"}


@pytest.mark.parametrize("path", ["../../precious", "a/../../../precious", "../precious", "a/./b"])
def test_a_bucket_path_cannot_leave_the_folder_of_working_copies(
    cloud, tmp_path: Path, path: str
) -> None:
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
def test_names_that_a_disk_or_a_bucket_reads_otherwise_are_refused(output: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be a part of gs://BUCKET/PATH"):
        RunDirectory(output)


def test_a_local_directory_is_not_taken_for_a_working_copy(cloud, tmp_path: Path) -> None:
    own = tmp_path / "runs" / "bucket" / "some" / "run"
    (own / "prefix").mkdir(parents=True)
    (own / "metrics.jsonl").write_text("of a local run")
    with pytest.raises(ConfigError, match=r"is not a working copy, .* would replace its files"):
        RunDirectory(OUTPUT).fetch()
    (own / ".prefix-jax.bucket").write_text("gs://other/run\n")
    with pytest.raises(ConfigError, match=r"is the working copy of gs://other/run"):
        RunDirectory(OUTPUT).fetch()
    assert (own / "metrics.jsonl").read_text() == "of a local run"


def test_checkpoints_of_another_program_in_a_bucket_are_left_alone(
    cloud, tiny_model_dir: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "cloud/bucket/some/run/checkpoints/100/state"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("arrays")
    with pytest.raises(ConfigError, match=r"checkpoints in it would be replaced"):
        tiny_runs.run(tiny_runs.on_one_device(tiny_model_dir), OUTPUT)
    assert theirs.read_text() == "arrays"


def test_the_results_which_end_a_run_come_last(cloud, tmp_path: Path, monkeypatch) -> None:
    sent: list[str] = []
    opened = buckets.FakeBackend.open

    def open_and_tell(self, path, mode):
        if "w" in mode:
            sent.append(Path(path).name)
        return opened(self, path, mode)

    monkeypatch.setattr(buckets.FakeBackend, "open", open_and_tell)
    place = RunDirectory(OUTPUT)
    place.directory.mkdir(parents=True)
    for name in ("results.json", "loss.png", "predictions.jsonl"):
        (place.directory / name).write_text(name)
    place.publish()
    assert sent == ["loss.png", "predictions.jsonl", "results.json"]


def test_a_bucket_that_refuses_says_what_to_look_at(cloud) -> None:
    place = RunDirectory(OUTPUT)
    place.directory.mkdir(parents=True)
    (place.directory / "loss.png").write_text("a")
    cloud.failure = RuntimeError("403 Forbidden\nmore")
    with pytest.raises(CheckpointError, match=r"cannot write .*403 Forbidden\. Is the bucket"):
        place.publish()


def test_a_bucket_that_cannot_be_read_costs_no_working_copy(cloud) -> None:
    place = RunDirectory(OUTPUT)
    place.fetch()
    (place.directory / "metrics.jsonl").write_text("1\n")
    place.publish()
    cloud.failure = RuntimeError("503 Unavailable")
    with pytest.raises(CheckpointError, match=r"cannot read .*503 Unavailable"):
        RunDirectory(OUTPUT).fetch()
    assert (place.directory / "metrics.jsonl").read_text() == "1\n"


def test_a_bucket_takes_one_more_package(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"pip install 'prefix-jax\[gcs\]'"):
        RunDirectory(OUTPUT)


@pytest.mark.parametrize("output", ["gs://", "gs://bucket", "gs://bucket/", "gs://bucket//"])
def test_a_bucket_as_a_whole_is_no_place(output: str) -> None:
    """Its working copy would be that of all runs, which reading it replaces."""
    with pytest.raises(ConfigError, match="gs://BUCKET/PATH"):
        RunDirectory(output)


def test_other_addresses_are_refused() -> None:
    with pytest.raises(ConfigError, match="gs://BUCKET/PATH"):
        RunDirectory("s3://bucket/run")


@pytest.mark.parametrize("output", ["gs:/bucket/run", "runs/gs:/bucket", "s3:/bucket/run"])
def test_an_address_with_one_slash_is_refused(output: str) -> None:
    with pytest.raises(ConfigError, match="gs://BUCKET/PATH"):
        RunDirectory(output)


def test_a_dangling_link_as_output_names_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("missing")
    with (
        pytest.raises(ConfigError, match="a symbolic link to missing, which does not exist"),
        RunDirectory(str(tmp_path / "link")).owned(),
    ):
        pass


def test_a_run_that_loses_its_machine_ends_as_if_it_had_not(
    cloud, tiny_model_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    """The checkpoints stand on disk here, for TensorStore writes their arrays itself: with a real
    bucket, or an emulator of one, see docs/tpu.md."""
    shelf = tmp_path / "checkpoints"
    monkeypatch.setattr(fitting.RunDirectory, "checkpoints", property(lambda _: epath.Path(shelf)))
    pretrained = tiny_runs.on_one_device(tiny_model_dir)
    with tiny_runs.killed_at(7):
        tiny_runs.run(pretrained, OUTPUT)
    (tmp_path / "runs").rename(tmp_path / "lost")
    tiny_runs.run(pretrained, OUTPUT)
    assert "results.json" in stored(tmp_path)
    moved = shelf.rename(tmp_path / "runs/bucket/some/run/checkpoints").parent
    shelf = tmp_path / "whole" / "checkpoints"
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
def test_an_output_that_cannot_be_a_path_is_refused(output: str, message: str):
    with pytest.raises(ConfigError) as caught:
        RunDirectory(output)
    assert message in str(caught.value)


def test_an_output_below_the_home_directory_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDirectory("~/runs/a").directory == tmp_path / "runs" / "a"
