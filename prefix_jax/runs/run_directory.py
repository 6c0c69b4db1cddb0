"""Run directories: on disk, or in a bucket with a working copy on disk."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from prefix_jax.artifact import PREFIXES
from prefix_jax.errors import CheckpointError, ConfigError, PrefixJaxError, reason
from prefix_jax.mesh import agreed
from prefix_jax.methods.multitask import PARTS
from prefix_jax.runs.checkpoint_store import files_below
from prefix_jax.runs.lock import BucketLock, FileLock, Lock
from prefix_jax.runs.results import write_atomically
from prefix_jax.untrusted.paths import expand, explain

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
# Everything that a run writes to its directory. Other entries are the user's: they are neither
# deleted nor copied to a bucket.
WRITTEN = (
    CONFIG,
    CHECKPOINTS,
    "metrics.jsonl",
    "tensorboard",
    "profile",
    "loss.png",
    "prefix",
    PREFIXES,
    PARTS,
    "predictions.jsonl",
    "predictions-before.jsonl",
    "results.json",
)

_BUCKET = "gs://"
# In this order: the results, which complete a run, come last.
_COPIED = tuple(name for name in WRITTEN if name != CHECKPOINTS)
# A run deletes files only in these. Any other missing file is an accident, and stays in the bucket.
_REPLACED = ("prefix", PREFIXES, "predictions.jsonl", "predictions-before.jsonl")
# A file with the bucket directory that a working copy mirrors.
_MARKER = ".prefix-jax.bucket"
_FETCHED = ".prefix-jax.fetched"


class RunDirectory:
    """The directory of a run.

    In a bucket (`gs://BUCKET/PATH`), all processes write the checkpoints together. Everything else
    is written by the first process to a working copy, `runs/BUCKET/PATH`: `fetch` copies the bucket
    to it, and `publish` mirrors it to the bucket. Both touch only what a run writes.

    Args:
        output: `Config.output_dir`.

    Attributes:
        directory: where the first process reads and writes everything but the checkpoints.

    Raises:
        ConfigError: the output is not a usable path, or the bucket cannot be used here.
    """

    def __init__(self, output: str):
        self._output = output
        self._remote: epath.Path | None = None
        self._published: dict[str, tuple[int, int]] = {}
        self._locks: list[Lock] = []
        if output.startswith(_BUCKET):
            bucket, path = _parse(output)
            self._remote = epath.Path(f"{_BUCKET}{bucket}/{path}")
            self.directory = Path("runs") / bucket / path
            if importlib.util.find_spec("gcsfs") is None:
                raise ConfigError(
                    f"output_dir {output}: a bucket requires another package; run "
                    "pip install 'prefix-jax[gcs]'"
                )
        # Orbax also mistakes a directory below "gs:" for a bucket.
        elif re.search(r"(^|/)\w+:/", output):
            raise ConfigError(
                f"output_dir {output}: give a directory, or a bucket as gs://BUCKET/PATH"
            )
        else:
            try:
                self.directory = expand(output, ConfigError)
            except ConfigError as error:
                raise ConfigError(f"output_dir {error}") from None

    @property
    def checkpoints(self) -> epath.Path:
        """The directory of the checkpoints."""
        return (self._remote or epath.Path(self.directory)) / CHECKPOINTS

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the output, so that no other run writes to it. Every process must call it.

        Raises:
            ConfigError: another run writes there, or it is not a directory.
            CheckpointError: the lock cannot be written.
        """
        failure: PrefixJaxError | None = None
        with contextlib.ExitStack() as stack:
            if jax.process_index() == 0:
                try:
                    stack.enter_context(self._lock())
                except PrefixJaxError as error:
                    failure = error
            if agreed(failure is not None):
                raise failure or ConfigError(
                    f"{self._output}: the first process could not lock output_dir; see its log"
                )
            yield

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        if self.directory.is_symlink() and not self.directory.exists():
            raise ConfigError(
                f"output_dir {self.directory} is a symbolic link to {self.directory.readlink()}, "
                "which does not exist; create that directory, or choose another output_dir"
            )
        if self.directory.exists() and not self.directory.is_dir():
            raise ConfigError(
                f"output_dir {self.directory} is a file; choose a directory for the run"
            )
        locks: list[Lock] = [FileLock(self.directory)]
        if self._remote is not None:
            locks.append(BucketLock(str(self._remote), _print))
        with contextlib.ExitStack() as stack:
            for lock in locks:
                lock.acquire()
                stack.callback(lock.release)
            self._locks = locks
            stack.callback(self._locks.clear)
            yield

    def fetch(self) -> None:
        """Copies the bucket to the working copy. Does nothing without a bucket.

        Raises:
            ConfigError: another run uses the working copy, or the directory is not a working copy.
            CheckpointError: the bucket cannot be read.
        """
        if self._remote is None or jax.process_index() != 0:
            return
        with contextlib.ExitStack() as stack:
            if not self._locks:
                lock = FileLock(self.directory)
                lock.acquire()
                stack.callback(lock.release)
            try:
                self._claim()
                self._fetch(self._remote)
            except OSError as error:
                raise CheckpointError(
                    f"cannot write the working copy {self.directory}: {explain(error)}"
                ) from error

    def _claim(self) -> None:
        """Marks an empty directory as the working copy of the bucket; refuses any other."""
        marker = self.directory / _MARKER
        origin = marker.read_text(errors="replace").strip() if marker.is_file() else None
        if origin is None and not any(map(_is_content, self.directory.iterdir())):
            marker.write_text(f"{self._remote}\n")
        elif origin != str(self._remote):
            what = "is not a working copy" if origin is None else f"is the working copy of {origin}"
            raise ConfigError(
                f"{self.directory} {what}, and fetching {self._remote} would replace its files; "
                "move it away, or choose another output_dir"
            )

    def _fetch(self, remote: epath.Path) -> None:
        # Into a new directory first, so that a lost connection does not cost the old copy.
        new = self.directory / _FETCHED
        _delete(new)
        with self._bucket_errors("read"):
            for name in _COPIED:
                for file in _below(remote / name):
                    copy = new / file.relative_to(remote)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(file.read_bytes())
        for name in _COPIED:
            _delete(self.directory / name)
            if (new / name).exists():
                (new / name).rename(self.directory / name)
        _delete(new)
        self._published = self._stamps()

    def publish(self) -> None:
        """Mirrors the working copy to the bucket; the results of a run come last.

        Raises:
            CheckpointError: the bucket cannot be written, or another run took the lock over.
        """
        for lock in self._locks:
            lock.check()
        if self._remote is None or jax.process_index() != 0:
            return
        if self._published and not self.directory.is_dir():
            raise CheckpointError(
                f"the working copy {self.directory} was removed during the run; run the same "
                "command again to resume from the last checkpoint"
            )
        now = self._stamps()
        with self._bucket_errors("write"):
            for name in now:
                if self._published.get(name) != now[name]:
                    (self._remote / name).write_bytes((self.directory / name).read_bytes())
                    self._published[name] = now[name]
            for name in self._published.keys() - now.keys():
                if name.partition("/")[0] in _REPLACED:
                    (self._remote / name).unlink(missing_ok=True)
                    del self._published[name]

    def write_config(self, text: str) -> None:
        """Writes `config.yaml`, on the first process.

        Raises:
            CheckpointError: it cannot be written.
        """
        if jax.process_index() == 0:
            write_atomically(self.directory / CONFIG, text)

    def has_checkpoints(self) -> bool:
        """Returns whether a run has started to train here.

        Raises:
            CheckpointError: the bucket cannot be read.
        """
        with self._bucket_errors("read"):
            return self.checkpoints.exists()

    def _stamps(self) -> dict[str, tuple[int, int]]:
        """The files of the working copy that are mirrored, each with its size and time."""
        return {
            str(file.relative_to(self.directory)): _stamp(file)
            for name in _COPIED
            for file in map(Path, _below(epath.Path(self.directory / name)))
        }

    @contextlib.contextmanager
    def _bucket_errors(self, verb: str) -> Iterator[None]:
        """Turns a failure to "read" or "write" the bucket into a CheckpointError."""
        try:
            yield
        # gcsfs and its dependencies have no common base class of errors.
        except Exception as error:
            if self._remote is None:
                raise
            raise CheckpointError(
                f"cannot {verb} {self._remote}: {reason(error)}; check that the bucket exists "
                "(gcloud storage ls) and that this account may use it (gcloud auth "
                "application-default login, or the role Storage Object User for the service "
                "account of a TPU)"
            ) from error


def _parse(output: str) -> tuple[str, str]:
    """Splits gs://BUCKET/PATH into bucket and path.

    Raises:
        ConfigError: one of them is missing, or not a valid name in a bucket and on a disk.
    """
    bucket, _, path = output.removeprefix(_BUCKET).strip("/").partition("/")
    parts = path.split("/")
    if not path:
        raise ConfigError(
            f"output_dir {output}: a run needs its own folder in the bucket; give gs://BUCKET/PATH"
        )
    for part in (bucket, *parts):
        # The working copy has the same path below `runs`. The other characters are wildcards, or
        # separate the versions of an object.
        if part in ("", ".", "..") or re.search(r"[\x00-\x1f\x7f\\*?\[\]#]", part):
            raise ConfigError(
                f"output_dir {output}: {part!r} cannot be a part of gs://BUCKET/PATH; give plain "
                "names, without '..' and without any of \\ * ? [ ] #"
            )
    return bucket, path


def _below(path: epath.Path) -> list[epath.Path]:
    """Returns the file at a path, or all files below a directory."""
    if not path.exists():
        return []
    return files_below(path) if path.is_dir() else [path]


def _delete(path: Path) -> None:
    """Deletes a file, link or directory that this package wrote, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_content(path: Path) -> bool:
    """Returns whether an entry of a directory is more than this package's bookkeeping."""
    return not path.name.startswith(".prefix-jax.")


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns
