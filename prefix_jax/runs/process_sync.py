"""What the processes of a run tell each other at every step."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Of a host's name: it is its first label that tells hosts of one run apart.
_NAME_BYTES = 64


def host_names() -> list[str]:
    """The name of the host of each process, in their order. All of them call it."""
    own = np.frombuffer(socket.gethostname().encode()[:_NAME_BYTES], np.uint8)
    padded = np.zeros(_NAME_BYTES, np.uint8)
    padded[: len(own)] = own
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


@dataclasses.dataclass(frozen=True)
class ProcessStatus:
    """What all processes told at one step.

    Attributes:
        stop: whether any of them is asked to end.
        busy: seconds that each process spent on its own work, which the others wait for.
    """

    stop: bool
    busy: Sequence[float]


class ProcessSync:
    """Lets every process hear what all told at a step, when that step has ended.

    The words are gathered on the devices between two steps, by the arrays that each hands to the
    next: on CPU programs that do not depend on each other may run in another order in another
    process, and then their messages get mixed up. Every process makes the same calls in the same
    order, and hears the same.

    Args:
        stop: is set where this process is asked to end.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop, self._busy = stop, 0.0
        self._several = jax.process_count() > 1
        self._underway: jax.Array | None = None
        if self._several:
            mesh = Mesh(np.asarray(jax.devices()), "devices")
            self._spread = NamedSharding(mesh, PartitionSpec("devices"))
            everywhere = NamedSharding(mesh, PartitionSpec())
            self._gather = jax.jit(_gather, out_shardings=(everywhere, everywhere))
            owners = np.array([device.process_index for device in jax.devices()])
            self._firsts = [np.argmax(owners == index) for index in range(jax.process_count())]

    def post(self, busy: float, proceed: jax.Array) -> jax.Array:
        """Tells the others, behind the step that was started last.

        Args:
            busy: what this process spent on its own work, in seconds.
            proceed: bool, from that step.

        Returns:
            `proceed` for the next step.
        """
        self._busy = busy
        if not self._several:
            return proceed
        own = np.array([self._stop.is_set(), busy], np.float32)
        rows = np.tile(own, (jax.local_device_count(), 1))
        told_N2 = jax.make_array_from_process_local_data(self._spread, rows)
        self._underway, proceed = self._gather(told_N2, proceed)
        return proceed

    def collect(self) -> ProcessStatus:
        """What all told last; waits for the step behind which they did."""
        if self._underway is None:
            return ProcessStatus(self._stop.is_set() and not self._several, [self._busy])
        told_N2 = np.asarray(self._underway)
        return ProcessStatus(bool(told_N2[:, 0].any()), told_N2[self._firsts, 1].tolist())


def _gather(told_N2: jax.Array, proceed: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Always true, and known only once all is gathered.
    return told_N2, proceed & (told_N2 >= 0).all()
