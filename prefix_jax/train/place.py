"""Where a run lies: in a directory, or in a bucket with a working copy here."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from prefix_jax.errors import CheckpointError, ConfigError, reason
from prefix_jax.train.shelf import files_below

_BUCKET = "gs://"
_CHECKPOINTS = "checkpoints"
_LAST = "results.json"


class Place:
    """The directory of a run.

    In a bucket (`gs://BUCKET/PATH`) all processes write checkpoints together. Everything else is
    written by the first process into a working copy, `runs/BUCKET/PATH`, which `fetch` makes equal
    to the bucket, and `publish` the bucket equal to it.

    Args:
        output: of the config.

    Attributes:
        directory: where the first process finds and writes all files but the checkpoints.
        checkpoints: where the checkpoints are.

    Raises:
        ConfigError: a bucket cannot be used here.
    """

    def __init__(self, output: str):
        self._remote: epath.Path | None = None
        self._there: dict[str, tuple[int, int] | None] = {}
        if output.startswith(_BUCKET):
            bucket, _, path = output.removeprefix(_BUCKET).strip("/").partition("/")
            if not path.strip("/"):
                raise ConfigError(
                    f"output {output}: name a folder of the bucket, gs://BUCKET/PATH: a run wants "
                    "one of its own, which it takes whole for its working copy"
                )
            self._remote = epath.Path(output)
            self.directory = Path("runs") / bucket / path
            if importlib.util.find_spec("gcsfs") is None:
                raise ConfigError(
                    f"output {output}: a bucket takes one more package: "
                    "pip install 'prefix-jax[gcs]'"
                )
        elif "://" in output:
            raise ConfigError(f"output {output}: give a directory, or a bucket as gs://BUCKET/PATH")
        else:
            self.directory = Path(output)

    @property
    def checkpoints(self) -> epath.Path:
        return (self._remote or epath.Path(self.directory)) / _CHECKPOINTS

    def fetch(self) -> None:
        """Makes the working copy what the bucket holds.

        Raises:
            CheckpointError: the bucket cannot be read.
        """
        if self._remote is None or jax.process_index() != 0:
            return
        # Beside the old copy, which is not to be lost with the connection.
        new = self.directory.with_name(f"{self.directory.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        with self._talking("read"):
            for file in files_below(self._remote) if self._remote.exists() else ():
                name = str(file.relative_to(self._remote))
                if name.startswith(f"{_CHECKPOINTS}/"):
                    continue
                copy = new / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
                self._there[name] = _stamp(copy)
        shutil.rmtree(self.directory, ignore_errors=True)
        if new.exists():
            new.rename(self.directory)

    def publish(self) -> None:
        """Makes the bucket what the working copy holds; the results of a run last.

        Raises:
            CheckpointError: the bucket cannot be written.
        """
        if self._remote is None or jax.process_index() != 0:
            return
        files = [file for file in self.directory.rglob("*") if file.is_file()]
        now = {str(file.relative_to(self.directory)): _stamp(file) for file in files}
        with self._talking("write"):
            for name in sorted(now, key=lambda name: (name == _LAST, name)):
                if self._there.get(name) != now[name]:
                    (self._remote / name).write_bytes((self.directory / name).read_bytes())
                    self._there[name] = now[name]
            for name in self._there.keys() - now.keys():
                (self._remote / name).unlink(missing_ok=True)
                del self._there[name]

    @contextlib.contextmanager
    def _talking(self, verb: str) -> Iterator[None]:
        try:
            yield
        # gcsfs and the libraries below it have no base class of errors.
        except Exception as error:
            raise CheckpointError(
                f"cannot {verb} {self._remote}: {reason(error)}. Is the bucket there (gcloud "
                "storage ls), and may this account use it (gcloud auth application-default login, "
                "or the role Storage Object User for the service account of a TPU)?"
            ) from error


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
