"""Shares each process's stop flag and busy time once per step."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prefix_jax.train.loop import Hook

# Shared bytes of a host name. The first label is enough to distinguish the hosts of a run.
_NAME_BYTES = 64


def host_names() -> list[str]:
    """The host name of every process, by process index. Every process must call it."""
    own = np.frombuffer(socket.gethostname().encode()[:_NAME_BYTES], np.uint8)
    padded = np.zeros(_NAME_BYTES, np.uint8)
    padded[: len(own)] = own
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


@dataclasses.dataclass(frozen=True)
class ProcessStatus:
    """The reports of all processes at one step.

    Attributes:
        stop: whether any process was asked to stop.
        busy: seconds that each process spent reading its batch while the others waited.
    """

    stop: bool
    busy: Sequence[float]


class ProcessSync(Hook):
    """Makes all processes stop at the same step, and measures which one the others wait for.

    The reports are gathered on the devices between two steps, as part of the chain of arrays that
    each step passes to the next. Without that dependency, programs on CPU could run in a different
    order in another process, and their messages would get mixed up. Every process makes the same
    calls in the same order and collects the same status.

    Args:
        stop: set when this process is asked to stop.
        busy: returns the seconds that this process spent on its last batch.
    """

    def __init__(self, stop: threading.Event, busy: Callable[[], float] = lambda: 0.0) -> None:
        self._stop, self._busy = stop, busy
        self._posted = 0.0
        self._several = jax.process_count() > 1
        self._gathered: jax.Array | None = None
        self._status = ProcessStatus(False, [])
        if self._several:
            mesh = Mesh(np.asarray(jax.devices()), "devices")
            self._spread = NamedSharding(mesh, PartitionSpec("devices"))
            self._everywhere = NamedSharding(mesh, PartitionSpec())
            self._gather = jax.jit(_gather, out_shardings=(self._everywhere, self._everywhere))
            owners = np.array([device.process_index for device in jax.devices()])
            self._firsts = [np.argmax(owners == index) for index in range(jax.process_count())]

    def on_dispatch(self, step: int, proceed: jax.Array) -> jax.Array:
        return self.post(self._busy(), proceed)

    def on_metrics(self, step: int, metrics: Mapping[str, float], seconds: float) -> bool:
        self._status = self.collect()
        return self._status.stop

    def post(self, busy: float, proceed: jax.Array) -> jax.Array:
        """Posts this process's report, to be gathered after the step that was dispatched last.

        Args:
            busy: seconds that this process spent on its batch.
            proceed: bool, an output of that step.

        Returns:
            `proceed` for the next step.
        """
        self._posted = busy
        if not self._several:
            return proceed
        own = np.array([self._stop.is_set(), busy], np.float32)
        rows = np.tile(own, (jax.local_device_count(), 1))
        reports_N2 = jax.make_array_from_process_local_data(self._spread, rows)
        self._gathered, proceed = self._gather(reports_N2, proceed)
        return proceed

    def collect(self) -> ProcessStatus:
        """The status that was posted last. Waits for the step after which it was posted."""
        if self._gathered is None:
            return ProcessStatus(self._stop.is_set() and not self._several, [self._posted])
        reports_N2 = np.asarray(self._gathered)
        return ProcessStatus(bool(reports_N2[:, 0].any()), reports_N2[self._firsts, 1].tolist())

    def stop_requested(self) -> bool:
        """Returns whether any process was asked to stop since the last step.

        Every process must call it, once the metrics of that step are known.
        """
        if self._several:
            self.post(0.0, jax.device_put(np.bool_(True), self._everywhere))
        return self.collect().stop

    def busy(self) -> list[float]:
        """Seconds that each process spent on its batch, as last collected.

        This process's own value includes the batch that it has just read, for the next step.
        """
        busy, index = [*self._status.busy], jax.process_index()
        busy[index] = max(busy[index], self._busy())
        return busy


def _gather(reports_N2: jax.Array, proceed: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The comparison is always true, but its value depends on all reports.
    return reports_N2, proceed & (reports_N2 >= 0).all()
