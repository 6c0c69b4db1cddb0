"""Complete, incomplete and damaged checkpoints, mainly in a bucket. See also `test_checkpoints`."""

from __future__ import annotations

from pathlib import Path

import buckets
import pytest

from prefix_jax.errors import CheckpointError
from prefix_jax.runs.checkpoint_store import SUMS, CheckpointStore, GcsStore, LocalStore, make_store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GcsStore:
    buckets.install(tmp_path / "cloud", monkeypatch)
    store = make_store("gs://bucket/run/checkpoints")
    store.open()
    return store


def write(store: CheckpointStore, step: int, finish: bool = True) -> None:
    path = store.begin(step, clear=True)
    for name in ("_METADATA", "d/array"):
        if isinstance(store, LocalStore):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f"{name} of {step}")
    if finish:
        store.finish(step)


def test_selects_the_store_by_path(store: GcsStore, tmp_path: Path) -> None:
    assert isinstance(store, GcsStore)
    assert isinstance(make_store(tmp_path), LocalStore)


def test_a_checkpoint_is_complete_once_it_has_digests(store: GcsStore) -> None:
    assert store.steps() == []
    write(store, 3)
    write(store, 20)
    write(store, 100, finish=False)
    assert store.steps() == [3, 20]
    assert store.damage(store.directory / "3") is None


def test_open_deletes_incomplete_checkpoints(store: GcsStore, tmp_path: Path) -> None:
    write(store, 3)
    write(store, 6, finish=False)
    make_store(store.directory).open()
    assert store.steps() == [3]
    assert not (tmp_path / "cloud/bucket/run/checkpoints/6").exists()


def test_interrupted_deletion_leaves_no_complete_checkpoint(store: GcsStore, monkeypatch) -> None:
    write(store, 3)
    monkeypatch.setattr(buckets.FakeBackend, "rmtree", lambda *_: None)
    store.delete(3)
    assert store.steps() == []


def test_replaces_a_checkpoint_of_the_same_step(store: GcsStore, tmp_path: Path) -> None:
    write(store, 3)
    folder = tmp_path / "cloud/bucket/run/checkpoints/3"
    (folder / "d/array").write_text("first")
    (folder / "notes.txt").write_text("mine")
    write(store, 3)
    assert store.steps() == [3]
    assert store.damage(store.directory / "3") is None
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("change", ["other", "missing", "truncated", "renamed", "miscounted"])
def test_detects_damage(store: GcsStore, tmp_path: Path, change: str) -> None:
    write(store, 3)
    folder = tmp_path / "cloud/bucket/run/checkpoints/3"
    if change == "other":
        (folder / "d/array").write_text("other")
    elif change == "missing":
        (folder / "d/array").unlink()
    else:
        sums = (folder / SUMS).read_text().splitlines(keepends=True)
        (folder / SUMS).write_text(
            {
                "truncated": sums[0],
                "renamed": "".join(sums).replace("_METADATA", "_METADAT"),
                "miscounted": "".join(sums).replace("# 2", "# 3"),
            }[change]
        )
    assert store.damage(store.directory / "3") is not None


def test_digests_have_the_format_of_coreutils(store: GcsStore, tmp_path: Path) -> None:
    write(store, 3)
    lines = (tmp_path / "cloud/bucket/run/checkpoints/3" / SUMS).read_text().splitlines()
    assert [line[64:] for line in lines[:-1]] == ["  _METADATA", "  d/array"]
    assert lines[-1] == "# 2 files"


STRAYS = (".DS_Store", ".nfs0001", "notes.txt", "d/notes.txt", "d/.DS_Store", "mine/thesis.tex")


@pytest.mark.parametrize("stray", STRAYS)
@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_unlisted_files_are_not_damage_and_are_never_deleted(
    kind: str, stray: str, tmp_path: Path, store: GcsStore
) -> None:
    folder, opened = tmp_path / "cloud/bucket/run/checkpoints", store
    if kind == "disk":
        folder = tmp_path / "checkpoints"
        opened = make_store(folder)
        opened.open()
    write(opened, 3)
    file = folder / "3" / stray
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    assert opened.damage(opened.directory / "3") is None
    write(opened, 3)
    opened.delete(3)
    opened.sweep()
    opened.open()
    assert opened.steps() == []
    left = [path for path in folder.rglob("*") if path.is_file()]
    # In a bucket, a file in one of Orbax's folders looks like Orbax's once the list is deleted.
    if kind == "disk" or stray != "d/notes.txt":
        assert [path.read_text() for path in left] == ["mine"]
    else:
        assert left == []


def test_list_without_a_count_must_name_every_file(store: GcsStore, tmp_path: Path) -> None:
    """Older versions wrote lists without a count."""
    write(store, 3)
    sums = tmp_path / "cloud/bucket/run/checkpoints/3" / SUMS
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(lines[:-1]))
    assert store.damage(store.directory / "3") is None
    sums.write_text(lines[0])
    assert "is not listed" in store.damage(store.directory / "3")


def test_never_deletes_files_outside_the_checkpoint(store: GcsStore, tmp_path: Path) -> None:
    write(store, 3)
    outside = tmp_path / "cloud/bucket/run/precious.txt"
    outside.write_text("mine")
    (tmp_path / "cloud/bucket/run/checkpoints/3" / SUMS).write_text(
        f"{'0' * 64}  ../../precious.txt\n{'0' * 64}  {outside}\n# 2 files\n"
    )
    store.delete(3)
    assert outside.read_text() == "mine"


def test_ignores_and_keeps_foreign_entries(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    disk = make_store(folder)
    disk.open()
    write(disk, 3)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / SUMS).write_text("")
    (folder / "999").symlink_to(tmp_path / "nowhere")
    (folder / "998").symlink_to(tmp_path / "elsewhere")
    (folder / "997").write_text("a file")
    (folder / "5.deleting").symlink_to(tmp_path / "elsewhere")
    for name in ("0999", "٣", "٣.new", "mine.new", "30.old", "996", "1" * 30, "-1", "+1", "1_0"):
        (folder / name).mkdir()
        (folder / name / "thesis.tex").write_text("mine")
    (folder / ".DS_Store").write_text("")
    before = sorted(path for path in folder.rglob("*"))
    disk.open()
    disk.sweep()
    assert disk.steps() == [3]
    assert sorted(path for path in folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["5", "5.new"])
def test_taken_name_is_an_error_and_not_replaced(tmp_path: Path, name: str) -> None:
    disk = make_store(tmp_path / "checkpoints")
    disk.open()
    file = tmp_path / "checkpoints" / name / "thesis.tex"
    file.parent.mkdir()
    file.write_text("mine")
    with pytest.raises(
        CheckpointError, match=rf"checkpoints/{name} exists and is not a checkpoint"
    ):
        write(disk, 5)
    assert file.read_text() == "mine"
