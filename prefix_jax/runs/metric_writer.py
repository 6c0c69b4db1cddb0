"""Metrics on disk: `metrics.jsonl`, and event files for TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from prefix_jax.errors import CheckpointError
from prefix_jax.train.loop import Hook
from prefix_jax.untrusted.json import parse_json

Kind = Literal["train", "dev", "test"]


class MetricWriter(Hook):
    """Appends every step and every evaluation to `metrics.jsonl` and to `tensorboard/`.

    A line of `metrics.jsonl` is {"step": …, "kind": …, values by name, "time": …}, where `time` is
    in seconds since 1970. Each line reaches the operating system before `write` returns, so a
    killed process loses at most the line that it was writing.

    A run that starts at step 0 overwrites both. A run that resumes at step s drops everything after
    s and the results on the test split, so that the files read as if it had never stopped.

    Args:
        directory: the run directory; created if missing.
        start_step: the optimizer steps taken before this process.

    Raises:
        CheckpointError: a file cannot be written, or the existing one is not ours.
    """

    def __init__(self, directory: Path, start_step: int) -> None:
        self._metrics = directory / "metrics.jsonl"
        host = socket.gethostname()
        # TensorBoard reads the files of a directory in the order of their names. A name repeats
        # only if the later file replaces the earlier one.
        self._events = (
            directory
            / "tensorboard"
            / f"events.out.tfevents.{int(time.time())}.{host}.{start_step:08d}"
        )
        with contextlib.ExitStack() as files:
            with _writing(self._metrics):
                directory.mkdir(parents=True, exist_ok=True)
                _drop_after(self._metrics, start_step)
                self._metrics_file = files.enter_context(self._metrics.open("ab"))
            # tensorboardX's own writer uses a queue and a thread, which dies on a full disk and
            # leaves the training waiting. Only its formats are needed.
            with _writing(self._events):
                self._events.parent.mkdir(exist_ok=True)
                self._events_file = files.enter_context(self._events.open("wb"))
            self._event(file_version="brain.Event:2")
            # From this step on TensorBoard hides earlier events; SummaryWriter's purge_step.
            purge_step = start_step + 1 if start_step else 0
            self._event(step=purge_step, session_log=SessionLog(status=SessionLog.START))
            self._files = files.pop_all()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def on_metrics(self, step: int, metrics: Mapping[str, float], seconds: float) -> bool:
        speed = {
            "seconds": round(seconds, 6),
            "tokens_per_second": round(metrics["tokens"] / max(seconds, 1e-9), 1),
        }
        self.write(step, "train", {**metrics, **speed})
        return False

    def write(self, step: int, kind: Kind, values: Mapping[str, float]) -> None:
        """Records values. Those that are not finite become null, because JSON cannot express them.

        Raises:
            CheckpointError: a file cannot be written.
        """
        values = {name: float(value) for name, value in values.items()}
        known = {name: x if math.isfinite(x) else None for name, x in values.items()}
        line = {"step": step, "kind": kind, **known, "time": round(time.time(), 3)}
        self._check_present()
        with _writing(self._metrics):
            self._metrics_file.write(json.dumps(line).encode() + b"\n")
            self._metrics_file.flush()
        scalars = [
            Summary.Value(tag=f"{kind}/{name}", simple_value=x) for name, x in values.items()
        ]
        self._event(step=step, summary=Summary(value=scalars))

    def _check_present(self) -> None:
        """Raises CheckpointError if the file or its directory was removed.

        Otherwise writes would succeed, to a file that no longer has a name.
        """
        try:
            now = self._metrics.stat()
        except OSError:
            now = None
        if now is not None and os.path.samestat(now, os.fstat(self._metrics_file.fileno())):
            return
        raise CheckpointError(
            f"{self._metrics} was removed or replaced during the run, which stops here; run the "
            "same command again to resume from the last remaining checkpoint"
        )

    def close(self) -> None:
        """Closes the files.

        Raises:
            CheckpointError: an earlier write had failed, and fails again.
        """
        with _writing(self._metrics.parent):
            self._files.close()

    def _event(self, **fields: Any) -> None:
        """Appends one event in the framing of TFRecord: length, checksum, bytes, checksum."""
        content = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(content))
        parts = (length, _checksum(length), content, _checksum(content))
        with _writing(self._events):
            self._events_file.write(b"".join(parts))
            self._events_file.flush()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Reads the complete lines of a run's `metrics.jsonl`, even while it is being written.

    Raises:
        CheckpointError: the file is missing, or was not written by `MetricWriter`.
    """
    return [line for _, line in _lines(directory / "metrics.jsonl")]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields each complete line, after the offset of its end."""
    end = 0
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith(b"\n"):
                    return  # incomplete: the process was killed while writing it
                end += len(text)
                yield end, _parse(text, f"{path}:{number}")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        line = parse_json(text.decode(), where, CheckpointError)
    except (UnicodeDecodeError, CheckpointError):
        line = None
    if not (
        isinstance(line, dict)
        and type(line.get("step")) is int
        and all(
            isinstance(value, str) if name == "kind" else type(value) in (int, float, type(None))
            for name, value in line.items()
        )
    ):
        raise CheckpointError(
            f"{where} is not a line of metrics with a step; remove the line, or move the file away"
        )
    return line


def _drop_after(path: Path, step: int) -> None:
    """Cuts the file before its first line of a later step or of the test split; at step 0, empties
    it."""
    if not path.exists():
        return
    end = 0
    if step > 0:
        for line_end, line in _lines(path):
            if line["step"] > step or line.get("kind") == "test":
                break
            end = line_end
    os.truncate(path, end)


def _checksum(content: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(content))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}; fix this, then run the same command again to "
            "resume from the last checkpoint"
        ) from error
