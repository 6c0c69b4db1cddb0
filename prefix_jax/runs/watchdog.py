"""Notices a step that takes far longer than the others, and a run that stands still."""

from __future__ import annotations

import collections
import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

# A step is slow that takes so many times the median of the recent ones; of fewer than the least
# number of steps it would say little.
_FACTOR = 10
_LEAST, _RECENT = 5, 200
# Standing still for less is not worth a word, nor for less than this while the step compiles.
_STILL_SECONDS = 60.0
_COMPILING_SECONDS = 900.0


class Watchdog:
    """Watches the steps of one process, from a thread of its own.

    Steps are timed without evaluations and checkpoints. A slow one is told by the first process,
    with the one that kept the others waiting. When no step ends for ten times as long as usual, and
    a minute at least, every process says where it stands, and again whenever that time has doubled:
    the one that does not wait for the devices is the one to look at.

    Args:
        warn: is told, from either thread.
        hosts: the name of every process's, in their order.
        process: the number of this one.
        clock: seconds.
    """

    def __init__(
        self,
        warn: Callable[[str], None],
        hosts: Sequence[str],
        process: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._warn, self._clock = warn, clock
        self._hosts, self._process = hosts, process
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._doing = "starting"
        self._since = clock()
        self._told_at = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watchdog:
        self._since = self._clock()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Says what this process does instead of waiting for the devices."""
        before, self._doing = self._doing, what
        try:
            yield
        finally:
            self._doing = before

    def step(self, step: int, seconds: float, busy: Sequence[float] = ()) -> None:
        """Notes that a step has ended.

        Args:
            step: its number.
            seconds: from the end of the one before.
            busy: seconds that each process spent on its batch; empty where that is not known.
        """
        # The first one compiles.
        if self._doing != "starting":
            usual = self._usual()
            if self._process == 0 and usual is not None and seconds >= _FACTOR * usual:
                self._warn(
                    f"step {step} took {seconds:.1f} s, {seconds / usual:.0f} times as long as "
                    f"usual: {self._cause(seconds, busy)}"
                )
            self._recent.append(seconds)
        self._doing = "waiting for the devices"
        self.heartbeat()

    def heartbeat(self) -> None:
        """Says that this process goes on: after an evaluation, or a checkpoint."""
        self._since, self._told_at = self._clock(), 0.0

    def check(self) -> None:
        """Tells if no step has ended for too long. The thread calls it every few seconds."""
        still = self._clock() - self._since
        usual = self._usual()
        limit = _COMPILING_SECONDS if usual is None else max(_STILL_SECONDS, _FACTOR * usual)
        if still < max(limit, 2 * self._told_at):
            return
        self._told_at = still
        took = "" if usual is None else f" (a step takes {usual:.1f} s as a rule)"
        who = self._who(self._process)
        self._warn(f"no step has ended for {still:.0f} s{took}; {who} is {self._doing}")

    def _usual(self) -> float | None:
        return statistics.median(self._recent) if len(self._recent) >= _LEAST else None

    def _cause(self, seconds: float, busy: Sequence[float]) -> str:
        slowest = max(range(len(busy)), key=busy.__getitem__, default=None)
        if slowest is not None and busy[slowest] >= seconds / 2:
            return f"{self._who(slowest)} needed {busy[slowest]:.1f} s for its batch"
        count = len(self._hosts)
        all_of_them = self._who(0) if count == 1 else f"all {count} processes"
        return f"{all_of_them} waited for the devices"

    def _who(self, process: int) -> str:
        host, count = f"host {self._hosts[process]}", len(self._hosts)
        return host if count == 1 else f"process {process} of {count} on {host}"

    def _run(self) -> None:
        while not self._over.wait(5.0):
            self.check()
