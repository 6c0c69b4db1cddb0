"""Checkpoint directories: which ones are complete, and how they are replaced and deleted.

On a disk the name of a directory says what it is:

    100.new/       being written
    100/           complete: SHA256SUMS lists every file, and all are on disk
    100.deleting/  being deleted

In a bucket nothing can be renamed, and a file is there as a whole or not at all. There a directory
is complete if it has SHA256SUMS, which is written last and deleted first.

Orbax reads a metadata file that a power cut emptied as "no metadata", and a flipped bit in an array
as another number. With the digests one process can tell whether a checkpoint is whole before any
process starts to load it.

Entries that this package did not write (a symbolic link, a folder `0999`, a file `.DS_Store` or
notes in a checkpoint) are neither read nor deleted.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from etils import epath

from prefix_jax.artifact.atomic_dir import fsync, fsync_tree
from prefix_jax.errors import CheckpointError
from prefix_jax.untrusted.paths import explain

# In the format of coreutils: `sha256sum --check SHA256SUMS` verifies a checkpoint by hand.
SUMS = "SHA256SUMS"
_NEW, _DELETING = ".new", ".deleting"
_UNFINISHED = re.compile(rf"(\d+)({_NEW}|{_DELETING}\d*)(\.orbax-checkpoint-tmp.*)?")
# Orbax's entries at the top of a checkpoint: what to delete where there is no list of files.
_ORBAX = re.compile(
    r"_CHECKPOINT_METADATA|_METADATA|_sharding|commit_success\.txt|orbax\.checkpoint|state|pytree"
    r"|array_metadatas|manifest\.ocdbt|ocdbt\.process_\d+|d"
)


def make_store(directory: epath.PathLike) -> CheckpointStore:
    """The shelf of a directory on disk, or of one in a bucket (gs://…)."""
    text = str(directory)
    # Orbax takes absolute paths only.
    return (
        GcsStore(epath.Path(text))
        if "://" in text
        else LocalStore(epath.Path(Path(text).absolute()))
    )


class CheckpointStore(abc.ABC):
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
        """Remarks on the space that is left, for messages; never fails."""

    def damage(self, path: epath.Path) -> str | None:
        """What is wrong with a checkpoint's files; None if nothing is."""
        try:
            digests, counted = _read_sums(path)
            if not counted:
                # The list may have been cut short.
                for file in _sealed(path):
                    if str(file.relative_to(path)) not in digests:
                        return f"{file} is not listed in {SUMS}"
            for name, digest in digests.items():
                if _digest(path / name) != digest:
                    return f"{path / name} is not what was written"
        except FileNotFoundError as error:
            return f"{error.filename or error} is missing"
        except (OSError, ValueError) as error:
            return str(error)
        return None


class LocalStore(CheckpointStore):
    """Checkpoints on a file system of this machine, or one that several share."""

    def open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self._unfinished():
            step = path.name.removesuffix(_NEW)
            if _is_step(step) and self.damage(path) is None:
                self._publish(path)
        self.sweep()

    def steps(self) -> list[int]:
        return sorted(
            int(path.name)
            for path in self.directory.iterdir()
            if _is_step(path.name) and _is_checkpoint(path)
        )

    def begin(self, step: int, acts: bool) -> epath.Path:
        new = self.directory / f"{step}{_NEW}"
        if acts:
            _refuse_foreign(new)
            _refuse_foreign(self.directory / str(step))
        return new

    def finish(self, step: int) -> None:
        new = self.directory / f"{step}{_NEW}"
        _seal(new)
        fsync_tree(Path(new))
        self._publish(new)

    def delete(self, step: int) -> None:
        count = 0
        while (old := self.directory / f"{step}{_DELETING}{count or ''}").exists():
            count += 1
        (self.directory / str(step)).rename(old)
        _remove(old)

    def sweep(self) -> None:
        for path in self._unfinished():
            # A thread of a failed save may still write there; then the next sweep gets it.
            with contextlib.suppress(OSError):
                _remove(path)

    def _unfinished(self) -> list[epath.Path]:
        return [
            path
            for path in self.directory.iterdir()
            if _UNFINISHED.fullmatch(path.name) and _is_folder(path)
        ]

    def room(self) -> str:
        try:
            return f"{shutil.disk_usage(self.directory).free / 1e6:,.1f} MB free there"
        except OSError as error:
            return f"the directory cannot be read: {explain(error)}"

    def _publish(self, new: epath.Path) -> None:
        """Renames 100.new to 100. If this is killed, calling it again finishes it."""
        path = new.with_suffix("")
        _refuse_foreign(path)
        if path.exists():
            self.delete(int(path.name))
        new.rename(path)
        fsync(Path(path.parent))


class GcsStore(CheckpointStore):
    """Checkpoints in Google Cloud Storage."""

    # Files that were in the directory of a checkpoint before it was written.
    _others: frozenset[epath.Path] = frozenset()

    def open(self) -> None:
        self.sweep()

    def steps(self) -> list[int]:
        complete = (sums.parent.name for sums in self.directory.glob(f"*/{SUMS}"))
        return sorted(int(name) for name in complete if _is_step(name))

    def begin(self, step: int, acts: bool) -> epath.Path:
        path = self.directory / str(step)
        if acts and path.exists():
            self.delete(step)
            self._others = frozenset(files_below(path))
        return path

    def finish(self, step: int) -> None:
        _seal(self.directory / str(step), self._others)

    def delete(self, step: int) -> None:
        _remove(self.directory / str(step), sums_first=True)

    def sweep(self) -> None:
        if not self.directory.exists():
            return
        complete = set(self.steps())
        for path in self.directory.iterdir():
            if _is_step(path.name) and int(path.name) not in complete:
                _remove(path)

    def room(self) -> str:
        return "is the bucket there, and may this account write to it?"


def _is_step(name: str) -> bool:
    """Whether a name is a step as this package writes it: ASCII digits without leading zeros."""
    return re.fullmatch(r"0|[1-9][0-9]{0,17}", name) is not None


def _is_folder(path: epath.Path) -> bool:
    return path.is_dir() and not Path(path).is_symlink()


def _is_checkpoint(path: epath.Path) -> bool:
    """Whether a directory on disk is a checkpoint, complete or not, of this package."""
    if not _is_folder(path):
        return False
    return any(entry.name == SUMS or _ORBAX.fullmatch(entry.name) for entry in path.iterdir())


def _refuse_foreign(path: epath.Path) -> None:
    """Raises CheckpointError if a checkpoint's name is taken by something else."""
    if os.path.lexists(path) and not _is_checkpoint(path):
        raise CheckpointError(
            f"{path} exists and is not a checkpoint, but the next checkpoint needs that name; "
            "move it away and start again"
        )


def files_below(path: epath.Path) -> list[epath.Path]:
    """All files of a directory, in order; on disk or in a bucket."""
    files = []
    for folder, _, names in path.walk():
        # In a bucket `walk` forgets what stands before the colon.
        below = str(folder).removeprefix(str(path).partition("://")[2] or str(path))
        files += [path / below.strip("/") / name for name in names]
    return sorted(files)


def _sealed(path: epath.Path) -> list[epath.Path]:
    """The files to make digests of: all but hidden ones, such as .DS_Store and .nfs000… ."""
    return [file for file in files_below(path) if file.name != SUMS and file.name[0] != "."]


def _digest(file: epath.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seal(path: epath.Path, others: Collection[epath.Path] = ()) -> None:
    """Writes the digests of all files but `others`."""
    files = [file for file in _sealed(path) if file not in others]
    lines = [f"{_digest(file)}  {file.relative_to(path)}\n" for file in files]
    # A comment to sha256sum. Without the count, a list that was cut short would look complete.
    (path / SUMS).write_text("".join([*lines, f"# {len(lines)} files\n"]))


def _read_sums(path: epath.Path) -> tuple[dict[str, str], bool]:
    """The digests of a checkpoint by file name, and whether the list has its closing count.

    Raises:
        OSError: the list is missing or unreadable.
        ValueError: it is malformed, or its count is wrong.
    """
    lines = (path / SUMS).read_text().splitlines()
    counted = bool(lines) and lines[-1].startswith("#")
    if counted and lines.pop() != f"# {len(lines)} files":
        raise ValueError(f"{path / SUMS} does not list as many files as it says")
    digests = {}
    for line in lines:
        digest, name = line.split("  ", 1)
        digests[name] = digest
    return digests, counted


def _remove(path: epath.Path, sums_first: bool = False) -> None:
    """Deletes the files of a checkpoint that this package wrote, and folders that are then empty.

    Those are the files that SHA256SUMS lists; without a list, those that Orbax names. Other files
    stay. The list goes last, so that calling this again finishes what was cut short.

    Args:
        path: a checkpoint, whole or not.
        sums_first: delete the list first, for stores where it marks a complete checkpoint.
    """
    listed: Mapping[str, str] = {}
    whole_list = _DELETING in path.suffix and not (path / SUMS).exists()
    with contextlib.suppress(OSError, ValueError):
        listed, whole_list = _read_sums(path)
    if sums_first:
        (path / SUMS).unlink(missing_ok=True)
    for file in files_below(path):
        name = str(file.relative_to(path))
        of_orbax = _ORBAX.fullmatch(name.partition("/")[0]) and file.name[0] != "."
        if name in listed or (of_orbax and not whole_list):
            file.unlink(missing_ok=True)
    (path / SUMS).unlink(missing_ok=True)
    if "://" not in str(path):  # a bucket has no folders
        for folder, _, _ in os.walk(path, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
