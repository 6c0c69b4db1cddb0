"""A trace of some steps, for XProf and Perfetto."""

from __future__ import annotations

from pathlib import Path

import jax

# Steps of this process that are left out before: the first compiles, the second still warms up.
_BEFORE = 2


class Profile:
    """Traces some steps of this process into a directory, from the third one on.

    Args:
        directory: gets `plugins/profile/…`, as XProf and TensorBoard read it.
        first: the step after which this process started.
        steps: how many to trace; None traces none.
    """

    def __init__(self, directory: Path, first: int, steps: int | None) -> None:
        self._directory = directory
        self._start = first + _BEFORE
        self._stop = self._start + (steps or 0)
        self._running = False

    def at(self, done: int) -> bool:
        """Whether tracing starts or ends after step `done`, which should then have ended."""
        return self._start < self._stop and done in (self._start, self._stop)

    def turn(self, done: int) -> None:
        """Starts the trace after the step where it starts; ends it after another."""
        if self.at(done) and done == self._start:
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif self._running:
            self._running = False
            jax.profiler.stop_trace()
