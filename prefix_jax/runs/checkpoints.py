"""Checkpoints of a run: written in the background, whole or not at all.

The arrays are plain Orbax; `shelf` tells which directories are complete.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import jax
import numpy as np
from etils.epath import PathLike
from orbax.checkpoint import v1 as ocp

from prefix_jax.errors import CheckpointError, DamagedCheckpointError, reason
from prefix_jax.mesh import agreed
from prefix_jax.runs.checkpoint_store import make_store
from prefix_jax.runs.orbax_logging import silence_orbax
from prefix_jax.train.step import TrainState


class Checkpoints:
    """The checkpoints of one run: a directory of its own, on a file system that its processes share
    or in a bucket.

    Every process makes the same calls in the same order. The first process alone renames, deletes,
    and decides which checkpoint is whole.
    """

    def __init__(self, directory: PathLike, keep: int, warn: Callable[[str], None]) -> None:
        """Opens the directory, and clears away what a killed process left half done.

        Args:
            directory: made if it does not exist; may begin with gs://.
            keep: how many of the latest checkpoints stay, besides the best one.
            warn: is told about damaged checkpoints.

        Raises:
            CheckpointError: the directory cannot be made or written.
        """
        self._store = make_store(directory)
        self.directory = self._store.directory
        self._keep = keep
        self._warn = warn
        self._damaged: set[int] = set()
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        silence_orbax()
        if jax.process_index() == 0:
            try:
                self._store.open()
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
        return self._store.steps()

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
        context = ocp.Context()
        # Replicas share the writing of large arrays only: cutting up small ones would take XLA
        # seconds to compile, at the first save.
        context.array.saving.min_slice_bytes_for_replica_parallel = 2**24
        with self._failures(step), context:
            new = self._store.begin(step, acts=jax.process_index() == 0)
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

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and the metadata of one checkpoint.

        Args:
            step: which one.
            like: arrays or ShapeDtypeStructs with the shardings to restore to, on this mesh.

        Raises:
            DamagedCheckpointError: it is missing or damaged.
            CheckpointError: it holds other arrays than `like`.
        """
        path, complete = self.directory / str(step), self.steps()
        if not agreed(step in complete):
            raise DamagedCheckpointError(
                f"there is no checkpoint {path}; complete ones: {complete}"
            )
        damage = self._store.damage(path) if jax.process_index() == 0 else None
        if agreed(damage is not None):
            others = [other for other in complete if other != step]
            raise DamagedCheckpointError(
                f"checkpoint {path} is damaged ({damage}); other steps that can be restored: "
                f"{others or 'none'}"
            )
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
                damage = self._store.damage(self.directory / str(step))
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
                "put back a copy of one, or choose another output_dir to start from step 0"
            )
        return None

    def _finish(self, response: ocp.AsyncResponse[None], step: int, best: int | None) -> None:
        """Makes what Orbax has written a complete checkpoint. Runs in the background."""
        with self._failures(step):
            response.result()
            if jax.process_index() != 0:
                return
            self._store.finish(step)
            self._damaged.discard(step)
            whole = [step for step in self.steps() if step not in self._damaged]
            kept = {*whole[-self._keep :], step, best}
            for old in self.steps():
                if old in self._damaged or old not in kept:
                    self._store.delete(old)
            self._damaged.clear()

    @contextlib.contextmanager
    def _failures(self, step: int) -> Iterator[None]:
        """Turns a failure to write into a CheckpointError, and deletes what was half written."""
        try:
            yield
        # Tensorstore's errors are all ValueErrors.
        except (OSError, ValueError) as error:
            room, latest = self._store.room(), 0
            # The directory itself may be what is gone.
            with contextlib.suppress(OSError, ValueError):
                if jax.process_index() == 0:
                    self._store.sweep()
                latest = self.latest() or 0
            raise CheckpointError(
                f"cannot write the checkpoint of step {step} to {self.directory} "
                f"({room}): {error}; remove the cause (often a full disk) and give the same "
                f"command again: the run goes on from step {latest}"
            ) from error


def _load(path: PathLike, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
    )
    try:
        stored = ocp.metadata(path)
        _check_same_arrays(path, stored.metadata, like)
        return ocp.load(path, abstract), dict(stored.custom_metadata)
    # Whole according to its digests, but the disk may fail all the same.
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({reason(error)}); see whether the disk or the "
            "bucket is there, and start again"
        ) from error


def _check_same_arrays(path: PathLike, stored: Any, like: TrainState) -> None:
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
