"""Directories of checkpoints: which checkpoints are complete, and how to replace and delete them.

On a disk, a directory is renamed when its state changes:

    100.new/       being written
    100/           complete: SHA256SUMS lists every file, and all are synced to disk
    100.deleting/  being deleted

A bucket has no renames, but its files appear atomically. There a directory is complete if it has
SHA256SUMS, which is written last and deleted first.

Orbax reads a metadata file that a power cut emptied as "no metadata", and a flipped bit in an array
as another number. The digests allow one process to verify a checkpoint before any process loads it.

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
# Orbax's entries in a checkpoint, to delete if there is no list of files.
_ORBAX = re.compile(
    r"_CHECKPOINT_METADATA|_METADATA|_sharding|commit_success\.txt|orbax\.checkpoint|state|pytree"
    r"|array_metadatas|manifest\.ocdbt|ocdbt\.process_\d+|d"
)


def make_store(directory: epath.PathLike) -> CheckpointStore:
    """Returns the store of a directory on disk or in a bucket (gs://…)."""
    text = str(directory)
    if "://" in text:
        return GcsStore(epath.Path(text))
    # Orbax requires absolute paths.
    return LocalStore(epath.Path(Path(text).absolute()))


class CheckpointStore(abc.ABC):
    """A directory of checkpoints.

    Attributes:
        directory: contains one directory per step.
    """

    def __init__(self, directory: epath.Path) -> None:
        self.directory = directory

    @abc.abstractmethod
    def open(self) -> None:
        """Creates the directory, and completes or deletes what a killed process left."""

    def check_names(self, last_step: int) -> None:  # noqa: B027
        """Raises CheckpointError if a name that a later checkpoint needs is taken.

        Args:
            last_step: the last step that may be saved.
        """

    @abc.abstractmethod
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""

    @abc.abstractmethod
    def begin(self, step: int, clear: bool) -> epath.Path:
        """Returns where to write a checkpoint, which may replace one of the same step.

        Args:
            step: the step of the checkpoint.
            clear: whether to make room there; true for one process only.
        """

    @abc.abstractmethod
    def finish(self, step: int) -> None:
        """Marks the checkpoint that was written as complete."""

    @abc.abstractmethod
    def delete(self, step: int) -> None:
        """Deletes a checkpoint. If interrupted, the rest is not a complete checkpoint."""

    @abc.abstractmethod
    def sweep(self) -> None:
        """Deletes incomplete checkpoints."""

    @abc.abstractmethod
    def free_space(self) -> str:
        """Describes the free space for an error message. Never fails."""

    def damage(self, path: epath.Path) -> str | None:
        """Describes what is wrong with a checkpoint's files; None if they are intact."""
        try:
            digests, counted = _read_sums(path)
            if not counted:
                # The list may be truncated.
                for file in _sealed(path):
                    if str(file.relative_to(path)) not in digests:
                        return f"{file} is not listed in {SUMS}"
            for name, digest in digests.items():
                if _digest(path / name) != digest:
                    return f"{path / name} has changed since it was written"
        except FileNotFoundError as error:
            return f"{error.filename or error} is missing"
        except (OSError, ValueError) as error:
            return str(error)
        return None


class LocalStore(CheckpointStore):
    """Checkpoints on a file system, which several machines may share."""

    def open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self._unfinished():
            step = path.name.removesuffix(_NEW)
            if _is_step(step) and self.damage(path) is None:
                self._publish(path)
        self.sweep()

    def check_names(self, last_step: int) -> None:
        latest = max(self.steps(), default=-1)
        for path in self.directory.iterdir():
            name = path.name.removesuffix(_NEW)
            if _is_step(name) and latest < int(name) <= last_step:
                _refuse_foreign(path)

    def steps(self) -> list[int]:
        return sorted(
            int(path.name)
            for path in self.directory.iterdir()
            if _is_step(path.name) and _is_checkpoint(path)
        )

    def begin(self, step: int, clear: bool) -> epath.Path:
        new = self.directory / f"{step}{_NEW}"
        if clear:
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
            # A thread of a failed save may still write there; the next sweep deletes it then.
            with contextlib.suppress(OSError):
                _remove(path)

    def _unfinished(self) -> list[epath.Path]:
        return [
            path
            for path in self.directory.iterdir()
            if _UNFINISHED.fullmatch(path.name) and _is_folder(path)
        ]

    def free_space(self) -> str:
        try:
            return f"{shutil.disk_usage(self.directory).free / 1e6:,.1f} MB free"
        except OSError as error:
            return f"the directory cannot be read: {explain(error)}"

    def _publish(self, new: epath.Path) -> None:
        """Renames 100.new to 100. If it is killed, another call completes it."""
        path = new.with_suffix("")
        _refuse_foreign(path)
        if path.exists():
            self.delete(int(path.name))
        new.rename(path)
        fsync(Path(path.parent))


class GcsStore(CheckpointStore):
    """Checkpoints in Google Cloud Storage."""

    # Files that were in the directory of a checkpoint before it was written.
    _foreign: frozenset[epath.Path] = frozenset()

    def open(self) -> None:
        self.sweep()

    def steps(self) -> list[int]:
        complete = (sums.parent.name for sums in self.directory.glob(f"*/{SUMS}"))
        return sorted(int(name) for name in complete if _is_step(name))

    def begin(self, step: int, clear: bool) -> epath.Path:
        path = self.directory / str(step)
        if clear and path.exists():
            self.delete(step)
            self._foreign = frozenset(files_below(path))
        return path

    def finish(self, step: int) -> None:
        _seal(self.directory / str(step), self._foreign)

    def delete(self, step: int) -> None:
        _remove(self.directory / str(step), sums_first=True)

    def sweep(self) -> None:
        if not self.directory.exists():
            return
        complete = set(self.steps())
        for path in self.directory.iterdir():
            if _is_step(path.name) and int(path.name) not in complete:
                _remove(path)

    def free_space(self) -> str:
        return "check that the bucket exists and that this account may write to it"


def _is_step(name: str) -> bool:
    """Returns whether a name is a step: ASCII digits without leading zeros."""
    return re.fullmatch(r"0|[1-9][0-9]{0,17}", name) is not None


def _is_folder(path: epath.Path) -> bool:
    return path.is_dir() and not Path(path).is_symlink()


def _is_checkpoint(path: epath.Path) -> bool:
    """Returns whether a path on disk is a checkpoint of this package, complete or not."""
    if not _is_folder(path):
        return False
    return any(entry.name == SUMS or _ORBAX.fullmatch(entry.name) for entry in path.iterdir())


def _refuse_foreign(path: epath.Path) -> None:
    """Raises CheckpointError if something else has the name of a checkpoint."""
    if os.path.lexists(path) and not _is_checkpoint(path):
        raise CheckpointError(
            f"{path} exists and is not a checkpoint, but a checkpoint needs that name; "
            "move it away and start again"
        )


def files_below(path: epath.Path) -> list[epath.Path]:
    """Returns all files below a directory on disk or in a bucket, sorted."""
    files = []
    for folder, _, names in path.walk():
        # In a bucket, `walk` drops the scheme.
        below = str(folder).removeprefix(str(path).partition("://")[2] or str(path))
        files += [path / below.strip("/") / name for name in names]
    return sorted(files)


def _sealed(path: epath.Path) -> list[epath.Path]:
    """Returns the files that get a digest: all but hidden ones (.DS_Store, .nfs0001)."""
    return [file for file in files_below(path) if file.name != SUMS and file.name[0] != "."]


def _digest(file: epath.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seal(path: epath.Path, foreign: Collection[epath.Path] = ()) -> None:
    """Writes the digests of all files but the `foreign` ones."""
    files = [file for file in _sealed(path) if file not in foreign]
    lines = [f"{_digest(file)}  {file.relative_to(path)}\n" for file in files]
    # Without the count, a truncated list would look complete. To sha256sum it is a comment.
    (path / SUMS).write_text("".join([*lines, f"# {len(lines)} files\n"]))


def _read_sums(path: epath.Path) -> tuple[dict[str, str], bool]:
    """Returns the digests of a checkpoint by file name, and whether the list ends with its count.

    Raises:
        OSError: the list is missing or unreadable.
        ValueError: it is malformed, or its count is wrong.
    """
    lines = (path / SUMS).read_text().splitlines()
    counted = bool(lines) and lines[-1].startswith("#")
    if counted and lines.pop() != f"# {len(lines)} files":
        raise ValueError(f"{path / SUMS} has a wrong number of files in its last line")
    digests = {}
    for line in lines:
        digest, name = line.split("  ", 1)
        digests[name] = digest
    return digests, counted


def _remove(path: epath.Path, sums_first: bool = False) -> None:
    """Deletes the files of a checkpoint that this package wrote, and folders that become empty.

    These are the files that SHA256SUMS lists or, without a list, those with Orbax's names. Other
    files remain. The list is deleted last, so that another call completes an interrupted one.

    Args:
        path: a checkpoint, complete or not.
        sums_first: delete the list first, for stores where it marks a complete checkpoint.
    """
    listed: Mapping[str, str] = {}
    list_is_complete = _DELETING in path.suffix and not (path / SUMS).exists()
    with contextlib.suppress(OSError, ValueError):
        listed, list_is_complete = _read_sums(path)
    if sums_first:
        (path / SUMS).unlink(missing_ok=True)
    for file in files_below(path):
        name = str(file.relative_to(path))
        orbax_file = _ORBAX.fullmatch(name.partition("/")[0]) and file.name[0] != "."
        if name in listed or (orbax_file and not list_is_complete):
            file.unlink(missing_ok=True)
    (path / SUMS).unlink(missing_ok=True)
    if "://" not in str(path):  # a bucket has no folders
        for folder, _, _ in os.walk(path, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
