"""Where checkpoints stand, and which of them are complete.

On a disk the name of a directory tells:

    100.new/   being written
    100/       complete: SHA256SUMS lists every file, and all was on disk before it got this name
    100.old/   being deleted

In a bucket nothing can be renamed, and a file is there as a whole or not at all. There a directory
is complete that holds SHA256SUMS, which is written last and deleted first.

Orbax reads a metadata file that a power cut emptied as "no metadata", and a flipped bit in an array
as another number. With the digests one process can tell whether a checkpoint is whole before any
process starts to load it.
"""

from __future__ import annotations

import abc
import hashlib
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from etils import epath

from prefix_jax.artifact.replace import sync, sync_entry

# In the format of coreutils: `sha256sum --check SHA256SUMS` verifies a checkpoint by hand.
SUMS = "SHA256SUMS"
_UNFINISHED = (".new", ".old", ".orbax-checkpoint-tmp")


def make_shelf(directory: epath.PathLike) -> Shelf:
    """The shelf of a directory on disk, or of one in a bucket (gs://…)."""
    text = str(directory)
    # Orbax takes absolute paths only.
    return Bucket(epath.Path(text)) if "://" in text else Disk(epath.Path(Path(text).absolute()))


class Shelf(abc.ABC):
    """A directory of checkpoints.

    Attributes:
        directory: holds one directory a step.
    """

    def __init__(self, directory: epath.Path) -> None:
        self.directory = directory

    @abc.abstractmethod
    def open(self) -> None:
        """Makes the directory, and finishes or clears away what a killed process left."""

    @abc.abstractmethod
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""

    @abc.abstractmethod
    def begin(self, step: int, acts: bool) -> epath.Path:
        """Where to write a checkpoint, which may replace one of the same step.

        Args:
            step: its name.
            acts: whether this process clears the place; one of them does.
        """

    @abc.abstractmethod
    def finish(self, step: int) -> None:
        """Makes complete what has been written."""

    @abc.abstractmethod
    def delete(self, step: int) -> None:
        """Deletes a checkpoint; at no moment is half of it taken for a complete one."""

    @abc.abstractmethod
    def sweep(self) -> None:
        """Deletes what is not complete."""

    @abc.abstractmethod
    def room(self) -> str:
        """What there is to say of the room that is left."""

    def damage(self, path: epath.Path) -> str | None:
        """What is wrong with a checkpoint's files; None if nothing is."""
        try:
            listed = {
                path / name: digest
                for digest, name in (
                    line.split("  ", 1) for line in (path / SUMS).read_text().splitlines()
                )
            }
            for file in sorted({*listed, *_files(path)}):
                if file not in listed:
                    return f"{file} is not listed in {SUMS}"
                if _digest(file) != listed[file]:
                    return f"{file} is not what was written"
        except FileNotFoundError as error:
            return f"{error.filename or error} is missing"
        except (OSError, ValueError) as error:
            return str(error)
        return None


class Disk(Shelf):
    """Checkpoints on a file system of this machine, or one that several share."""

    def open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for new in self.directory.glob("*.new"):
            if self.damage(new) is None:
                self._publish(new)
        self.sweep()

    def steps(self) -> list[int]:
        return _steps(path.name for path in self.directory.iterdir())

    def begin(self, step: int, acts: bool) -> epath.Path:
        return self.directory / f"{step}.new"

    def finish(self, step: int) -> None:
        new = self.directory / f"{step}.new"
        _seal(new)
        sync(Path(new))
        self._publish(new)

    def delete(self, step: int) -> None:
        path = self.directory / str(step)
        old = path.with_name(f"{step}.old")
        path.rename(old)
        old.rmtree()

    def sweep(self) -> None:
        for path in self.directory.iterdir():
            if path.suffix in _UNFINISHED:
                # A thread of a failed save may still write there; then the next sweep gets it.
                shutil.rmtree(path, ignore_errors=True)

    def room(self) -> str:
        return f"{shutil.disk_usage(self.directory).free / 1e6:,.1f} MB free there"

    def _publish(self, new: epath.Path) -> None:
        """100.new becomes 100. Whenever this is killed, calling it again finishes it."""
        path = new.with_suffix("")
        if path.exists():
            self.delete(int(path.name))
        new.rename(path)
        sync_entry(Path(path.parent))


class Bucket(Shelf):
    """Checkpoints in Google Cloud Storage."""

    def open(self) -> None:
        self.sweep()

    def steps(self) -> list[int]:
        return _steps(sums.parent.name for sums in self.directory.glob(f"*/{SUMS}"))

    def begin(self, step: int, acts: bool) -> epath.Path:
        path = self.directory / str(step)
        if acts and path.exists():
            self.delete(step)
        return path

    def finish(self, step: int) -> None:
        _seal(self.directory / str(step))

    def delete(self, step: int) -> None:
        path = self.directory / str(step)
        (path / SUMS).unlink(missing_ok=True)
        path.rmtree()

    def sweep(self) -> None:
        if not self.directory.exists():
            return
        complete = {str(step) for step in self.steps()}
        for path in self.directory.iterdir():
            if path.name not in complete:
                path.rmtree()

    def room(self) -> str:
        return "is the bucket there, and may this account write to it?"


def _steps(names: Iterable[str]) -> list[int]:
    return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))


def files_below(path: epath.Path) -> list[epath.Path]:
    """All files of a directory, in order; on disk or in a bucket."""
    files = []
    for folder, _, names in path.walk():
        # In a bucket `walk` forgets what stands before the colon.
        below = str(folder).removeprefix(str(path).partition("://")[2] or str(path))
        files += [path / below.strip("/") / name for name in names]
    return sorted(files)


def _files(path: epath.Path) -> list[epath.Path]:
    return [file for file in files_below(path) if file.name != SUMS]


def _digest(file: epath.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seal(path: epath.Path) -> None:
    """Writes the digests."""
    lines = (f"{_digest(file)}  {file.relative_to(path)}\n" for file in _files(path))
    (path / SUMS).write_text("".join(lines))
