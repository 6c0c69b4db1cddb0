"""Traces some steps for XProf and Perfetto."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import jax

from prefix_jax.train.loop import Hook
from prefix_jax.train.step import TrainState

# Steps of this process before the trace: the first compiles, and the second still warms up.
_SKIPPED = 2


class Profiler(Hook):
    """Traces some steps of this process into a directory, from its third step on.

    A trace that is still running ends when the profiler is closed.

    Args:
        directory: receives `plugins/profile/…`, which XProf and TensorBoard read.
        start_step: the steps taken before this process started.
        steps: how many steps to trace; None for no trace.
    """

    def __init__(self, directory: Path, start_step: int, steps: int | None) -> None:
        self._directory = directory
        self._start = start_step + _SKIPPED
        self._stop = self._start + (steps or 0)
        self._running = False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # JAX runs one trace at a time, so that a later run in this process would fail.
        self.stop()

    def due(self, step: int, last: bool) -> bool:
        if last:
            return self._running
        return self._start < self._stop and step in (self._start, self._stop)

    def on_state(self, step: int, state: TrainState, last: bool) -> bool:
        if self._running:
            self.stop()
        elif not last:
            self.start()
        return False

    def start(self) -> None:
        """Starts the trace."""
        jax.profiler.start_trace(self._directory)
        self._running = True

    def stop(self) -> None:
        """Ends the trace, if it is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
