"""Directories that change as a whole: at any moment, a reader finds the old one or the new one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

# What systems leave in any directory: Finder, NFS.
SYSTEM_FILES = re.compile(r"\.DS_Store|\._.*|\.nfs.*")
# All that this package writes into directories that change as a whole.
_WRITTEN = re.compile(
    r"prefix\.(json|safetensors)|arrays(\.orbax-checkpoint-tmp.*)?|adapter_(config|model)\.\w+"
)


@contextlib.contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Yields a new directory next to `path`, which takes its place when the block ends well.

    If the block fails, the new directory is removed and `path` is what it was. A process that is
    killed between the two renames leaves the old directory at `backup_path(path)`.

    Args:
        path: the directory to make or to replace.

    Raises:
        OSError: a disk does not take it, or a name is taken by what this package did not write.
    """
    new = path.with_name(f".{path.name}.unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(new)  # of a run that was killed
    new.mkdir()
    try:
        yield new
        fsync_tree(new)
        _put_in_place(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _clear(path: Path) -> None:
    """Deletes a directory of a prefix or an adapter, whole or not, and nothing else."""
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
            errno.EEXIST, f"{path} exists and was not written by prefix-jax; move it away"
        )
    shutil.rmtree(path)


def backup_path(path: Path) -> Path:
    """Where the old directory stands until the new one has taken its place."""
    return path.with_name(f".{path.name}.replaced")


def _put_in_place(new: Path, path: Path) -> None:
    old = backup_path(path)
    if path.exists():
        _clear(old)
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
    """Waits until a directory and all that it holds are on disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            fsync(Path(folder, name))
        fsync(Path(folder))


def fsync(path: Path) -> None:
    """Waits until one file, or the names in one directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
