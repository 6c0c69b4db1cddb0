"""Atomic replacement of directories: a reader sees either the old or the new content."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

# Files that Finder and NFS leave in directories.
SYSTEM_FILES = re.compile(r"\.DS_Store|\._.*|\.nfs.*")
# Files that this package writes into such directories.
_WRITTEN = re.compile(
    r"prefix\.json|(prefix|ngrams)\.safetensors|arrays(\.orbax-checkpoint-tmp.*)?"
    r"|adapter_(config|model)\.\w+"
)


@contextlib.contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Yields a new directory next to `path`, and renames it to `path` if the block succeeds.

    If the block fails, the new directory is removed and `path` stays unchanged. A process that is
    killed between the two renames leaves the old directory at `backup_path(path)`.

    Args:
        path: the directory to create or replace.

    Raises:
        OSError: the disk is full or not writable, or a file that this package did not write has a
            name that is needed.
    """
    new = path.with_name(f".{path.name}.unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(new)  # left by a killed process
    new.mkdir()
    try:
        yield new
        fsync_tree(new)
        _swap(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _remove(path: Path) -> None:
    """Deletes a complete or partial directory that this package wrote, and nothing else."""
    if not os.path.lexists(path):
        return
    if (
        path.is_symlink()
        or not path.is_dir()
        or not all(
            _WRITTEN.fullmatch(entry.name) or SYSTEM_FILES.fullmatch(entry.name)
            for entry in path.iterdir()
        )
    ):
        raise FileExistsError(
            errno.EEXIST, f"{path} exists and was not written by prefix-jax; move or delete it"
        )
    shutil.rmtree(path)


def backup_path(path: Path) -> Path:
    """Returns the path of the old directory while it is being replaced."""
    return path.with_name(f".{path.name}.replaced")


def _swap(new: Path, path: Path) -> None:
    old = backup_path(path)
    if path.exists():
        _remove(old)
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            old.rename(path)
        raise
    fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def fsync_tree(directory: Path) -> None:
    """Flushes a directory and everything in it to disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            fsync(Path(folder, name))
        fsync(Path(folder))


def fsync(path: Path) -> None:
    """Flushes one file, or the entries of one directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
