"""Which checkpoints in a bucket are complete. For those on a disk see `test_checkpoint`."""

from __future__ import annotations

from pathlib import Path

import buckets
import pytest

from prefix_jax.train.shelf import SUMS, Bucket, Disk, make_shelf


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    buckets.install(tmp_path / "cloud", monkeypatch)
    shelf = make_shelf("gs://bucket/run/checkpoints")
    shelf.open()
    return shelf


def write(shelf: Bucket, step: int, finish: bool = True) -> None:
    path = shelf.begin(step, acts=True)
    for name in ("_METADATA", "d/array"):
        (path / name).write_text(f"{name} of {step}")
    if finish:
        shelf.finish(step)


def test_a_path_tells_what_it_is_on(shelf: Bucket, tmp_path: Path) -> None:
    assert isinstance(shelf, Bucket)
    assert isinstance(make_shelf(tmp_path), Disk)


def test_a_checkpoint_counts_once_its_digests_are_there(shelf: Bucket) -> None:
    assert shelf.steps() == []
    write(shelf, 3)
    write(shelf, 20)
    write(shelf, 100, finish=False)
    assert shelf.steps() == [3, 20]
    assert shelf.damage(shelf.directory / "3") is None


def test_what_a_killed_process_left_is_cleared_away(shelf: Bucket, tmp_path: Path) -> None:
    write(shelf, 3)
    write(shelf, 6, finish=False)
    make_shelf(shelf.directory).open()
    assert shelf.steps() == [3]
    assert not (tmp_path / "cloud/bucket/run/checkpoints/6").exists()


def test_a_deletion_that_is_cut_short_leaves_no_checkpoint(shelf: Bucket, monkeypatch) -> None:
    write(shelf, 3)
    monkeypatch.setattr(buckets.FakeBackend, "rmtree", lambda *_: None)
    shelf.delete(3)
    assert shelf.steps() == []


def test_a_second_save_of_a_step_replaces_the_first(shelf: Bucket, tmp_path: Path) -> None:
    write(shelf, 3)
    folder = tmp_path / "cloud/bucket/run/checkpoints/3"
    (folder / "stray").write_text("of the first")
    write(shelf, 3)
    assert shelf.steps() == [3]
    assert not (folder / "stray").exists()


@pytest.mark.parametrize("change", ["other", "missing", "added"])
def test_damage_is_seen(shelf: Bucket, tmp_path: Path, change: str) -> None:
    write(shelf, 3)
    folder = tmp_path / "cloud/bucket/run/checkpoints/3"
    if change == "other":
        (folder / "d/array").write_text("other")
    elif change == "missing":
        (folder / "d/array").unlink()
    else:
        (folder / "d/more").write_text("more")
    assert shelf.damage(shelf.directory / "3") is not None


def test_the_digests_are_those_of_coreutils(shelf: Bucket, tmp_path: Path) -> None:
    write(shelf, 3)
    lines = (tmp_path / "cloud/bucket/run/checkpoints/3" / SUMS).read_text().splitlines()
    assert [line[64:] for line in lines] == ["  _METADATA", "  d/array"]
