"""Reports slow steps and stalled runs, naming the process to look at."""

from __future__ import annotations

import collections
import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType

from prefix_jax.data.batch import Batch
from prefix_jax.train.loop import Hook

# A step is slow if it lasts this many times the median of the recent steps, once there are enough.
_FACTOR = 10
_MIN_STEPS, _MAX_STEPS = 5, 200
# A run is reported as stalled after at least this long; before the first steps, which compile,
# after the second value.
_STALL_SECONDS = 60.0
_COMPILE_SECONDS = 900.0


class Watchdog(Hook):
    """Watches the steps of one process, from a thread.

    Step times exclude evaluations and checkpoints. The first process reports a slow step, with the
    process that kept the others waiting. If no step ends for ten times the usual time, and at least
    a minute, every process reports what it is doing, and again whenever that time has doubled: the
    process that is not waiting for the devices is the one to look at.

    Args:
        warn: receives the reports, from either thread.
        hosts: the host name of every process, by process index.
        process: the index of this process.
        clock: returns the time in seconds.
        busy: returns the seconds that each process spent on its batch; [] if unknown.
    """

    def __init__(
        self,
        warn: Callable[[str], None],
        hosts: Sequence[str],
        process: int = 0,
        clock: Callable[[], float] = time.monotonic,
        busy: Callable[[], Sequence[float]] = list,
    ) -> None:
        self._warn, self._clock, self._busy = warn, clock, busy
        self._hosts, self._process = hosts, process
        self._recent: collections.deque[float] = collections.deque(maxlen=_MAX_STEPS)
        self._activity = "starting"
        self._since = clock()
        self._reported_at = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

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
        self._closed.set()
        self._thread.join()

    @contextlib.contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Names what this process does instead of waiting for the devices."""
        before, self._activity = self._activity, activity
        try:
            yield
        finally:
            self._activity = before
            self.heartbeat()

    def on_metrics(self, step: int, metrics: Mapping[str, float], seconds: float) -> bool:
        self.step(step, seconds, self._busy())
        return False

    def step(self, step: int, seconds: float, busy: Sequence[float] = ()) -> None:
        """Records the end of a step.

        Args:
            step: its number.
            seconds: since the end of the previous step.
            busy: seconds that each process spent on its batch; empty if unknown.
        """
        # The first step compiles.
        if self._activity != "starting":
            usual = self._usual()
            if self._process == 0 and usual is not None and seconds >= _FACTOR * usual:
                self._warn(
                    f"step {step} took {seconds:.1f} s, {seconds / usual:.0f} times as long as "
                    f"usual: {self._cause(seconds, busy)}"
                )
            self._recent.append(seconds)
        self._activity = "waiting for the devices"
        self.heartbeat()

    def heartbeat(self) -> None:
        """Records that this process is making progress."""
        self._since, self._reported_at = self._clock(), 0.0

    def check(self) -> None:
        """Warns if no step has ended for too long. The thread calls it every few seconds."""
        stalled = self._clock() - self._since
        usual = self._usual()
        limit = _COMPILE_SECONDS if usual is None else max(_STALL_SECONDS, _FACTOR * usual)
        if stalled < max(limit, 2 * self._reported_at):
            return
        self._reported_at = stalled
        typical = "" if usual is None else f" (a step usually takes {usual:.1f} s)"
        who = self._who(self._process)
        self._warn(f"no step has ended for {stalled:.0f} s{typical}; {who} is {self._activity}")

    def _usual(self) -> float | None:
        return statistics.median(self._recent) if len(self._recent) >= _MIN_STEPS else None

    def _cause(self, seconds: float, busy: Sequence[float]) -> str:
        slowest = max(range(len(busy)), key=busy.__getitem__, default=None)
        if slowest is not None and busy[slowest] >= seconds / 2:
            return f"{self._who(slowest)} needed {busy[slowest]:.1f} s for its batch"
        count = len(self._hosts)
        waiting = self._who(0) if count == 1 else f"all {count} processes"
        return f"{waiting} waited for the devices"

    def _who(self, process: int) -> str:
        host, count = f"host {self._hosts[process]}", len(self._hosts)
        return host if count == 1 else f"process {process} of {count} on {host}"

    def _run(self) -> None:
        while not self._closed.wait(5.0):
            self.check()


class WatchedBatches:
    """Iterates over batches and measures the time to read each one.

    Args:
        batches: the batches of the steps that remain.
        watchdog: shows which batch is being read.
        step: the step of the first batch.

    Attributes:
        seconds: what the last batch took.
    """

    def __init__(self, batches: Iterator[Batch], watchdog: Watchdog, step: int) -> None:
        self._batches, self._watchdog, self._step = batches, watchdog, step
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        with self._watchdog.doing(f"reading the batch of step {self._step}"):
            batch = next(self._batches)
        self.seconds = time.perf_counter() - began
        self._step += 1
        return batch
