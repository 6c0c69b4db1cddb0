"""A save that fails leaves the previous prefix, and never replaces files of others."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from stored_prefixes import CONTAINERS, PREFIXES, assert_equal, card_of, files, keys_values

from prefix_jax import artifact
from prefix_jax.artifact import store
from prefix_jax.errors import CheckpointError, PrefixError


@contextlib.contextmanager
def full_disk(*, files_up_to: int) -> Iterator[None]:
    """Limits the size of files, so that writes fail half-way in C++ and in Python."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (files_up_to, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # the compilation cache cannot write either
def test_full_disk_is_reported_and_loses_nothing(
    container: artifact.Container, stored: Path
) -> None:
    before = files(stored)
    larger = keys_values(length=400)
    with (
        full_disk(files_up_to=20_000),
        pytest.raises(CheckpointError, match=r"p \(the existing prefix is unchanged\): .*large"),
    ):
        artifact.save(stored, larger, card_of(larger), container)
    assert files(stored) == before
    assert [entry.name for entry in stored.parent.iterdir()] == ["p"]


@pytest.mark.parametrize(
    ("owner", "step"), [(store, "_write_arrays"), (Path, "write_text"), (os, "fsync")]
)
def test_failure_at_any_step_leaves_nothing_behind(
    owner: object, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(CheckpointError, match=r"\(nothing was written\): No space left on device"):
        artifact.save(tmp_path / "p", PREFIXES["kv"], card_of(PREFIXES["kv"]))
    assert list(tmp_path.iterdir()) == []


def test_interrupt_keeps_the_old_prefix(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = files(stored)
    monkeypatch.setattr(store, "_write_arrays", interrupt)
    with pytest.raises(KeyboardInterrupt):
        artifact.save(stored, PREFIXES["embeds"], card_of(PREFIXES["embeds"]))
    assert files(stored) == before


def test_failed_rename_restores_the_old_prefix(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = files(stored), Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if self.name == ".p.unfinished":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(CheckpointError, match="unchanged"):
        artifact.save(stored, PREFIXES["embeds"], card_of(PREFIXES["embeds"]))
    assert files(stored) == before


def test_names_the_backup_after_a_kill_between_renames(stored: Path) -> None:
    stored.rename(stored.with_name(".p.replaced"))
    with pytest.raises(PrefixError, match=r"\.p\.replaced, rename it to .*p"):
        artifact.load(stored)


def test_leftovers_of_a_killed_process_are_replaced(stored: Path) -> None:
    shutil.copytree(stored, stored.with_name(".p.replaced"))
    shutil.copytree(stored, stored.with_name(".p.unfinished"))
    produced = PREFIXES["embeds"]
    artifact.save(stored, produced, card_of(produced))
    assert_equal(artifact.load(stored)[0], produced)
    assert [entry.name for entry in stored.parent.iterdir()] == ["p"]


@pytest.mark.parametrize("name", [".p.unfinished", ".p.replaced"])
def test_never_deletes_foreign_files_with_reserved_names(stored: Path, name: str) -> None:
    foreign = stored.with_name(name) / "thesis.tex"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    with pytest.raises(CheckpointError, match=rf"{name} exists and was not written by prefix-jax"):
        artifact.save(stored, PREFIXES["embeds"], card_of(PREFIXES["embeds"]))
    assert foreign.read_text() == "mine"
    artifact.load(stored)


def test_replaces_a_prefix_with_system_files(stored: Path) -> None:
    (stored / ".DS_Store").write_text("")
    produced = PREFIXES["embeds"]
    artifact.save(stored, produced, card_of(produced))
    assert_equal(artifact.load(stored)[0], produced)


def test_replaces_a_prefix_or_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for name, container in (("kv", "orbax"), ("embeds", "safetensors"), ("hidden", "orbax")):
        artifact.save(tmp_path / "p", PREFIXES[name], card_of(PREFIXES[name]), container)
        assert_equal(artifact.load(tmp_path / "p")[0], PREFIXES[name])
    assert {entry.name for entry in (tmp_path / "p").iterdir()} == {"prefix.json", "arrays"}


@pytest.mark.parametrize("name", ["thesis.tex", "prefix.json/../notes"])
def test_never_replaces_other_directories(name: str, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / Path(name).name).write_text("years of work")
    with pytest.raises(PrefixError, match="exists and is not a prefix"):
        artifact.save(tmp_path / "work", PREFIXES["kv"], card_of(PREFIXES["kv"]))
    assert (tmp_path / "work" / Path(name).name).read_text() == "years of work"


def test_never_replaces_a_prefix_with_foreign_files(stored: Path) -> None:
    (stored / "notes.txt").write_text("mine")
    with pytest.raises(PrefixError, match="exists and is not a prefix"):
        artifact.save(stored, PREFIXES["kv"], card_of(PREFIXES["kv"]))
