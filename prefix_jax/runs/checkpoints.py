"""Checkpoints of a run, written in the background and atomically.

Orbax writes the arrays; a `CheckpointStore` determines which checkpoints are complete.
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
    """The checkpoints of one run, in a bucket or on a file system that its processes share.

    Every process makes the same calls in the same order. Only the first one renames, deletes and
    verifies.

    Args:
        directory: created if missing; may begin with gs://.
        keep: how many of the latest checkpoints to keep, in addition to the best one.
        warn: receives warnings about damaged checkpoints.
        last_step: the last step that may be saved; None skips the check of its name.

    Raises:
        CheckpointError: the directory cannot be created or written, or a file in it has the name
            of a coming checkpoint.
    """

    def __init__(
        self,
        directory: PathLike,
        keep: int,
        warn: Callable[[str], None],
        last_step: int | None = None,
    ) -> None:
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
                if last_step is not None:
                    self._store.check_names(last_step)
            except OSError as error:
                raise CheckpointError(
                    f"cannot write checkpoints to {self.directory}: {error}; "
                    "choose another output_dir"
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
            # The error that ended the run is more important.
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
        """Copies the state and returns; a thread writes it.

        `state` may be donated as soon as this returns. Once the checkpoint is complete, it replaces
        one of the same step, and checkpoints that are neither the latest nor the best are deleted.

        Args:
            step: the name of the checkpoint.
            state: what to store.
            metadata: anything that JSON can represent.
            best: the step whose checkpoint is kept even if it is old.

        Raises:
            CheckpointError: the previous checkpoint could not be written.
        """
        self.wait()
        context = ocp.Context()
        # Replicas share the writing of large arrays only. Slicing small ones would need seconds of
        # compilation at the first save.
        context.array.saving.min_slice_bytes_for_replica_parallel = 2**24
        with self._failures(step), context:
            new = self._store.begin(step, clear=jax.process_index() == 0)
            response = ocp.save_async(new, state, custom_metadata=dict(metadata))
        self._pending = self._thread.submit(self._finish, response, step, best)

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
            CheckpointError: it could not be written. Earlier checkpoints are intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits like `wait`, and ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores the state and the metadata of one checkpoint.

        Args:
            step: the step of the checkpoint.
            like: arrays or ShapeDtypeStructs with the shardings to restore to, on this mesh.

        Raises:
            DamagedCheckpointError: it is missing or damaged.
            CheckpointError: its arrays differ from `like`.
        """
        path, complete = self.directory / str(step), self.steps()
        if not agreed(step in complete):
            raise DamagedCheckpointError(
                f"checkpoint {path} does not exist; complete checkpoints: {complete}"
            )
        damage = self._store.damage(path) if jax.process_index() == 0 else None
        if agreed(damage is not None):
            others = [other for other in complete if other != step]
            raise DamagedCheckpointError(
                f"checkpoint {path} is damaged ({damage}); other steps: {others or 'none'}"
            )
        return _load(path, like)

    def restore_latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the latest undamaged checkpoint; None if there are no checkpoints.

        Damaged ones are skipped with a warning, and deleted after the next save.

        Raises:
            CheckpointError: all are damaged, or the arrays of the latest undamaged one differ from
                `like`.
        """
        intact = -1
        if jax.process_index() == 0:
            for step in reversed(self.steps()):
                damage = self._store.damage(self.directory / str(step))
                if damage is None:
                    intact = step
                    break
                self._damaged.add(step)
                self._warn(f"skipped the damaged checkpoint {self.directory / str(step)}: {damage}")
        intact = agreed(intact)
        if intact >= 0:
            return _load(self.directory / str(intact), like)
        if agreed(bool(self.steps())):
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged; "
                "restore a copy of one, or choose another output_dir to start from step 0"
            )
        return None

    def _finish(self, response: ocp.AsyncResponse[None], step: int, best: int | None) -> None:
        """Completes the checkpoint that Orbax has written, in the thread, and deletes old ones."""
        with self._failures(step):
            response.result()
            if jax.process_index() != 0:
                return
            self._store.finish(step)
            self._damaged.discard(step)
            intact = [step for step in self.steps() if step not in self._damaged]
            keep = {*intact[-self._keep :], step, best}
            for old in self.steps():
                if old in self._damaged or old not in keep:
                    self._store.delete(old)
            self._damaged.clear()

    @contextlib.contextmanager
    def _failures(self, step: int) -> Iterator[None]:
        """Turns a failed write into a CheckpointError, and deletes the incomplete checkpoint."""
        try:
            yield
        # All errors of TensorStore are ValueErrors.
        except (OSError, ValueError) as error:
            space, latest = self._store.free_space(), 0
            # The directory itself may be missing.
            with contextlib.suppress(OSError, ValueError):
                if jax.process_index() == 0:
                    self._store.sweep()
                latest = self.latest() or 0
            raise CheckpointError(
                f"cannot write the checkpoint of step {step} to {self.directory} "
                f"({space}): {error}; fix the cause (often a full disk) and run the same command "
                f"again to resume from step {latest}"
            ) from error


def _load(path: PathLike, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
    )
    try:
        stored = ocp.metadata(path)
        _check_same_arrays(path, stored.metadata, like)
        return ocp.load(path, abstract), dict(stored.custom_metadata)
    # The digests were right, but the disk may fail now.
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({reason(error)}); check that the disk or the "
            "bucket is available, and start again"
        ) from error


def _check_same_arrays(path: PathLike, stored: Any, like: TrainState) -> None:
    """Raises CheckpointError, naming the arrays, if `stored` and `like` have different arrays."""

    def arrays(tree: Any) -> dict[str, str]:
        # Orbax turns dataclasses and named tuples into dicts, with the same key paths.
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): (
                f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
            )
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    actual, expected = arrays(stored), arrays(like)
    different = [
        f"{name} is {actual.get(name, 'missing')}, expected {expected.get(name, 'missing')}"
        for name in expected | actual
        if actual.get(name) != expected.get(name)
    ]
    if different:
        more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
        raise CheckpointError(
            f"checkpoint {path} belongs to another run: {', '.join(different[:3])}{more}; "
            f"choose another output_dir, or delete {path.parent}"
        )
