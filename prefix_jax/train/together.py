"""What the processes of a run tell each other at every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Told:
    """What all processes told at one step.

    Attributes:
        stop: whether any of them is asked to end.
        busy: seconds that each process spent on its own work, which the others wait for.
    """

    stop: bool
    busy: Sequence[float]


class Together:
    """Lets every process hear what all told, one step later and without waiting.

    The sum runs on the devices behind the step that was started before it: when the next step has
    been started, it is there. Every process makes the same calls in the same order, and hears the
    same.
    """

    def __init__(self) -> None:
        self._several = jax.process_count() > 1
        self._underway: jax.Array | None = None
        if self._several:
            mesh = Mesh(np.asarray(jax.devices()), "devices")
            self._spread = NamedSharding(mesh, PartitionSpec("devices"))
            self._gather = jax.jit(
                lambda told_N2: told_N2, out_shardings=NamedSharding(mesh, PartitionSpec())
            )
            self._owners = np.array([device.process_index for device in jax.devices()])

    def tell(self, stop: bool, busy: float) -> Told:
        """Tells the others, and returns what all told at the call before; on one process, now."""
        if not self._several:
            return Told(stop, [busy])
        before = self._underway
        own = np.tile(np.array([stop, busy], np.float32), (jax.local_device_count(), 1))
        self._underway = self._gather(jax.make_array_from_process_local_data(self._spread, own))
        if before is None:
            return Told(False, [])
        told_N2 = np.asarray(before)
        firsts = [np.argmax(self._owners == index) for index in range(jax.process_count())]
        return Told(bool(told_N2[:, 0].any()), told_N2[firsts, 1].tolist())
