"""Directories that change as a whole: at any moment, a reader finds the old one or the new one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a new directory beside `path`, which takes its place when the block ends well.

    If the block fails, the new directory is removed and `path` is what it was. A process that is
    killed between the two renames leaves the old directory at `replaced(path)`.

    Args:
        path: the directory to make or to replace.
    """
    new = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if new.exists():  # of a run that was killed
            shutil.rmtree(new)
        new.mkdir()
        yield new
        sync(new)
        _put_in_place(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def replaced(path: Path) -> Path:
    """Where the old directory stands until the new one has taken its place."""
    return path.with_name(f".{path.name}.replaced")


def _put_in_place(new: Path, path: Path) -> None:
    old = replaced(path)
    if path.exists():
        if old.exists():
            shutil.rmtree(old)
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            old.rename(path)
        raise
    sync_entry(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(directory: Path) -> None:
    """Waits until a directory and all that it holds are on disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            sync_entry(Path(folder, name))
        sync_entry(Path(folder))


def sync_entry(path: Path) -> None:
    """Waits until one file, or the names in one directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
