"""A trace of some steps, for XProf and Perfetto."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import jax

# Steps of this process that are left out before: the first compiles, the second still warms up.
_BEFORE = 2


class Profiler:
    """Traces some steps of this process into a directory, from the third one on; what is traced
    when it is left ends there.

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

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # JAX traces one at a time: another run in this process could not.
        self.turn(last=True)

    def at(self, done: int) -> bool:
        """Whether tracing starts or ends after step `done`, which should then have ended."""
        return self._start < self._stop and done in (self._start, self._stop)

    def turn(self, last: bool) -> None:
        """Ends the trace that runs; where none does, starts it, unless this was the last step."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
        elif not last:
            jax.profiler.start_trace(self._directory)
            self._running = True
