"""Checkpoints of a run: written in the background, whole or not at all.

The arrays are plain Orbax. What stands here is the life of a checkpoint's directory:

    100.new/   being written
    100/       complete: SHA256SUMS lists every file, and all was on disk before it got this name
    100.old/   being deleted

Orbax reads a metadata file that a power cut emptied as "no metadata", and a flipped bit in an array
as another number. With the digests one process can tell whether a checkpoint is whole before any
process starts to load it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from prefix_jax.artifact.replace import sync, sync_entry
from prefix_jax.errors import CheckpointError
from prefix_jax.mesh import agreed
from prefix_jax.train.step import TrainState

# In the format of coreutils: `sha256sum --check SHA256SUMS` verifies a checkpoint by hand.
SUMS = "SHA256SUMS"
_UNFINISHED = (".new", ".old", ".orbax-checkpoint-tmp")


class Checkpoints:
    """The checkpoints of one run: a directory of its own on a file system that its processes share.

    Every process makes the same calls in the same order. The first process alone renames, deletes,
    and decides which checkpoint is whole.
    """

    def __init__(self, directory: Path, keep: int, warn: Callable[[str], None]) -> None:
        """Opens the directory, and clears away what a killed process left half done.

        Args:
            directory: made if it does not exist.
            keep: how many of the latest checkpoints stay, besides the best one.
            warn: is told about damaged checkpoints.

        Raises:
            CheckpointError: the directory cannot be made or written.
        """
        # Orbax takes absolute paths only.
        self.directory = directory.absolute()
        self._keep = keep
        self._warn = warn
        self._damaged: set[int] = set()
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # What Orbax raises, each of its threads also logs with a traceback.
        logging.getLogger("absl").addFilter(_not_of_orbax)
        if jax.process_index() == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                for new in self.directory.glob("*.new"):
                    if _damage(new) is None:
                        _publish(new)
                self._sweep()
            except OSError as error:
                raise CheckpointError(
                    f"cannot keep checkpoints in {self.directory}: {error}; "
                    "choose another output directory"
                ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            # What ended the run comes first.
            self._warn(str(failure))

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        names = (path.name for path in self.directory.iterdir())
        return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, state: TrainState, metadata: Mapping[str, Any], best: int | None = None
    ) -> None:
        """Takes the state and returns; the writing goes on in the background.

        `state` may be donated as soon as this returns. Once the checkpoint is complete, it replaces
        one of the same step, and those that are neither among the latest nor the best are deleted.

        Args:
            step: names the checkpoint.
            state: what to store.
            metadata: anything that JSON can hold.
            best: the step whose checkpoint stays however old it is.

        Raises:
            CheckpointError: the checkpoint before this one could not be written.
        """
        self.wait()
        new = self.directory / f"{step}.new"
        context = ocp.Context()
        # Replicas share the writing of large arrays only: cutting up small ones would take XLA
        # seconds to compile, at the first save.
        context.array.saving.min_slice_bytes_for_replica_parallel = 2**24
        with self._failures(step), context:
            response = ocp.save_async(new, state, custom_metadata=dict(metadata))
        self._pending = self._thread.submit(self._finish, response, step, best)

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises:
            CheckpointError: it could not be written. The checkpoints before it are intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, as `wait` does, and ends the background thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            logging.getLogger("absl").removeFilter(_not_of_orbax)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and the metadata of one checkpoint.

        Args:
            step: which one.
            like: arrays or ShapeDtypeStructs with the shardings to restore to, on this mesh.

        Raises:
            CheckpointError: it is missing, damaged, or holds other arrays than `like`.
        """
        path = self.directory / str(step)
        if not agreed(path.is_dir()):
            raise CheckpointError(f"there is no checkpoint {path}; complete ones: {self.steps()}")
        damage = _damage(path) if jax.process_index() == 0 else None
        if agreed(damage is not None):
            raise CheckpointError(f"checkpoint {path} is damaged ({damage}); use another one")
        return _load(path, like)

    def restore_latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest undamaged checkpoint; None if there is no checkpoint at all.

        A damaged one is skipped with a warning, and deleted after the next save.

        Raises:
            CheckpointError: all are damaged, or the newest undamaged one holds other arrays than
                `like`.
        """
        found = -1
        if jax.process_index() == 0:
            for step in reversed(self.steps()):
                damage = _damage(self.directory / str(step))
                if damage is None:
                    found = step
                    break
                self._damaged.add(step)
                self._warn(f"skipped the damaged checkpoint {self.directory / str(step)}: {damage}")
        found = agreed(found)
        if found >= 0:
            return _load(self.directory / str(found), like)
        if agreed(bool(self.steps())):
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged; "
                "delete the directory to start anew, or use another output directory"
            )
        return None

    def _finish(self, response: ocp.AsyncResponse[None], step: int, best: int | None) -> None:
        """Makes what Orbax has written a complete checkpoint. Runs in the background."""
        with self._failures(step):
            response.result()
            if jax.process_index() != 0:
                return
            new = self.directory / f"{step}.new"
            _seal(new)
            _publish(new)
            self._damaged.discard(step)
            whole = [step for step in self.steps() if step not in self._damaged]
            kept = {*whole[-self._keep :], step, best}
            for old in self.steps():
                if old in self._damaged or old not in kept:
                    _delete(self.directory / str(old))
            self._damaged.clear()

    def _sweep(self) -> None:
        for path in self.directory.iterdir():
            if path.suffix in _UNFINISHED:
                # A thread of a failed save may still write there; then the next sweep gets it.
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _failures(self, step: int) -> Iterator[None]:
        """Turns what a full disk raises into a CheckpointError, and frees what was taken of it."""
        try:
            yield
        # Tensorstore's errors are all ValueErrors.
        except (OSError, ValueError) as error:
            free = shutil.disk_usage(self.directory).free / 1e6
            if jax.process_index() == 0:
                self._sweep()
            raise CheckpointError(
                f"cannot write the checkpoint of step {step} to {self.directory} "
                f"({free:,.1f} MB free there): {error}. Make room and start again: "
                f"the run goes on from step {self.latest() or 0}"
            ) from error


def _load(path: Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    stored = ocp.metadata(path)
    _check_same_arrays(path, stored.metadata, like)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
    )
    return ocp.load(path, abstract), dict(stored.custom_metadata)


def _check_same_arrays(path: Path, stored: Any, like: TrainState) -> None:
    """Raises CheckpointError, naming the arrays, if Orbax could not restore `stored` as `like`."""

    def arrays(tree: Any) -> dict[str, str]:
        # Orbax has turned dataclasses and named tuples into dicts; their paths read the same.
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): (
                f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
            )
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    there, here = arrays(stored), arrays(like)
    different = [
        f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
        for name in here | there
        if there.get(name) != here.get(name)
    ]
    if different:
        more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
        raise CheckpointError(
            f"checkpoint {path} is of another run: {'; '.join(different[:3])}{more}. "
            f"Use another output directory, or delete {path.parent}"
        )


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != SUMS)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _damage(path: Path) -> str | None:
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
        return f"{error.filename} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _seal(path: Path) -> None:
    """Writes the digests, and has all of it on disk when it returns."""
    files = _files(path)
    lines = (f"{_digest(file)}  {file.relative_to(path)}\n" for file in files)
    (path / SUMS).write_text("".join(lines))
    sync(path)


def _publish(new: Path) -> None:
    """100.new becomes 100. Whenever this is killed, calling it again finishes it."""
    path = new.with_suffix("")
    if path.exists():
        _delete(path)
    new.rename(path)
    sync_entry(path.parent)


def _delete(path: Path) -> None:
    """Deletes a checkpoint; at no moment is half of it to be seen under its name."""
    old = path.with_name(path.name + ".old")
    path.rename(old)
    shutil.rmtree(old)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts
