"""TPUs that are not there: what their chips can do, and devices to compile for.

`libtpu` brings the compiler along, so that a machine without a TPU can compile for any of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from prefix_jax.errors import MeshError, reason
from prefix_jax.mesh import make_mesh

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do at most, as Google publishes it.

    Attributes:
        bf16, int8: operations a second in matrix products.
        hbm: bytes of memory. Of them the compiler leaves a little to the system: see `hbm_limit`.
        bandwidth: bytes a second between memory and the chip.
        link: bytes a second that one link to a neighbouring chip carries each way.
        ring: chips along an axis from which on its ends are linked, so that traffic goes both
            ways round; below, an axis is a line.
        axes: of the mesh of chips in a slice.
        pod: chips in a slice at most.
        devices: that JAX shows for one chip.
        dcn: bytes a second of the data centre's network for each chip, between slices.
        options: for the compiler, so that a device is what users see of this chip.
    """

    bf16: float
    int8: float
    hbm: int
    bandwidth: float
    link: float
    ring: int
    axes: int
    pod: int
    devices: int
    dcn: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


# https://docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x, "System architecture"; links
# are the bidirectional bandwidth of a chip over its 4 or 6 links, halved, and rings as in
# https://jax-ml.github.io/scaling-book/tpus. v4 computes int8 no faster than bf16; tpu7x has fp8
# where others have int8, and computes int8 as bf16. v4's two cores are one device to its users
# ("megacore"); those of tpu7x are two.
CHIPS = {
    "v4": Chip(
        275e12,
        275e12,
        32 * GIB,
        1228e9,
        50e9,
        4,
        3,
        4096,
        1,
        3.1e9,
        {"chip_config_name": "megacore"},
    ),
    "v5e": Chip(197e12, 393e12, 16 * GIB, 819e9, 50e9, 16, 2, 256, 1, 3.1e9),
    "v5p": Chip(459e12, 918e12, 95 * GIB, 2765e9, 100e9, 4, 3, 8960, 1, 6.2e9),
    "v6e": Chip(918e12, 1836e12, 32 * GIB, 1638e9, 100e9, 16, 2, 256, 1, 12.5e9),
    "tpu7x": Chip(2307e12, 2307e12, 192 * GIB, 7380e9, 100e9, 4, 3, 9216, 2, 12.5e9),
}

# By what JAX calls their devices.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}

_NAME = re.compile(r"(?:(\d+)\*)?([a-z0-9]+):(\d+(?:x\d+)*)")
# As Cloud TPU names slices: by their chips (v5litepod-16 is v5e:4x4), or by their cores, two a
# chip (v5p-8 is v5p:2x2x1).
_CLOUD = re.compile(r"((?:\d+\*)?)(?:(v5e|v5litepod|v6e)|(v4|v5p))-(\d+)")
_EXAMPLES = "v5e:4x4 (16 chips), v5p:2x2x1, v5e:1x1 (one chip), 2*v5e:4x4 (two slices)"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips in a row, a rectangle or a box, once or several times.

    Attributes:
        name: of the chip, in `CHIPS`.
        shape: chips along every axis of a slice.
        slices: how many there are; the data centre's network is between them.
        attached: the devices, if they are there; None compiles for some that are not.
    """

    name: str
    shape: tuple[int, ...]
    slices: int = 1
    attached: tuple[jax.Device, ...] | None = None

    @classmethod
    def parse(cls, text: str, slices: int | None = None) -> Topology:
        """Reads "v5e:4x4", or "2*v5e:4x4".

        Raises:
            MeshError: that is none.
        """
        found = _NAME.fullmatch(text.strip().lower())
        if not found:
            if written := _written(text.strip().lower()):
                raise MeshError(f"topology {text!r}: write its chips, {written}")
            raise MeshError(f"topology {text!r}: write it as one of {_EXAMPLES}")
        count, name, shape = found.groups()
        if name not in CHIPS:
            raise MeshError(f"topology {text}: the chip {name!r} is not one of {', '.join(CHIPS)}")
        sizes = tuple(map(int, shape.split("x")))
        axes = CHIPS[name].axes
        if len(sizes) != axes or not all(sizes):
            example = ":".join((name, "x".join("4" * axes)))
            raise MeshError(f"topology {text}: {name} has {axes} axes of chips, as in {example}")
        if math.prod(sizes) > CHIPS[name].pod:
            raise MeshError(
                f"topology {text}: a slice of {name} has {CHIPS[name].pod:,} chips at most; "
                "write several as 2*…"
            )
        if count is not None and slices not in (None, int(count)):
            raise MeshError(f"topology {text} is of {count} slices, and {slices} are asked for")
        number = int(count or (1 if slices is None else slices))
        if number < 1:
            raise MeshError(f"topology {text}: there has to be one slice at least")
        return cls(name, sizes, number)

    @classmethod
    def of(cls, devices: Sequence[jax.Device]) -> Topology:
        """The topology of devices that are there.

        Raises:
            MeshError: they are no TPUs, or of an unknown kind.
        """
        kind = devices[0].device_kind
        if kind not in _KINDS:
            raise MeshError(
                f"mesh: auto goes by the figures of TPUs ({', '.join(CHIPS)}) and knows none of "
                f"{len(devices)} x {kind}: give the sizes, as in mesh.fsdp={len(devices)}"
            )
        coords = np.array([device.coords for device in devices])
        sizes = tuple(int(size) for size in coords.max(0) - coords.min(0) + 1)
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        return cls(_KINDS[kind], sizes[: CHIPS[_KINDS[kind]].axes], slices, tuple(devices))

    def __str__(self) -> str:
        one = f"{self.name}:{'x'.join(map(str, self.shape))}"
        return one if self.slices == 1 else f"{self.slices}*{one}"

    @property
    def chip(self) -> Chip:
        """What each of its chips can do."""
        return CHIPS[self.name]

    @property
    def chips(self) -> int:
        """How many there are, in all slices."""
        return math.prod(self.shape) * self.slices

    def together(self, devices: int) -> bool:
        """Whether so many devices, which exchange activations in every layer, are of one slice."""
        return devices <= len(self.devices) // self.slices

    @property
    def hosts(self) -> int:
        """How many processes the devices belong to, if they are there; else 1, as nobody knows."""
        return len({device.process_index for device in self.attached or ()}) or 1

    @functools.cached_property
    def devices(self) -> Sequence[jax.Device]:
        """Devices to compile for. None of them computes anything.

        Raises:
            MeshError: `libtpu` is missing, or knows no such topology.
        """
        if self.attached is not None:
            return self.attached
        if importlib.util.find_spec("libtpu") is None:
            raise MeshError(
                "libtpu, the compiler for TPUs, is not installed: "
                'pip install "prefix_jax[tpu]" (no TPU is needed)'
            )
        asked: dict[str, Any] = dict(self.chip.options)
        # By default a host has 2x2 chips; slices that have fewer along an axis are one host's.
        usual = (2, 2, 1)
        bounds = (*self.shape, *(1 for _ in range(3 - len(self.shape))))
        if any(size % host for size, host in zip(bounds, usual, strict=True)):
            asked["chips_per_host_bounds"] = bounds
        if self.slices > 1:
            asked["num_slices"] = self.slices
        try:
            with _ready_to_load():
                found = topologies.get_topology_desc(
                    f"{self.name}:{'x'.join(map(str, self.shape))}", "tpu", **asked
                )
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise MeshError(f"the TPU compiler knows no topology {self}: {reason(error)}") from None
        return found.devices

    def mesh(self, sizes: Mapping[str, int]) -> Mesh:
        """The devices as `data` × `fsdp` × `sequence` × `tensor`.

        Raises:
            MeshError: the sizes do not multiply to their number.
        """
        return make_mesh(**sizes, devices=self.devices)

    @functools.cached_property
    def hbm_limit(self) -> int:
        """Bytes of memory that the compiler gives to a program on one device.

        It tells when it is asked for too much, which takes it a few hundredths of a second.
        """
        # Of devices that are there, one of this host: others' alone are not its to compile for.
        ours = (d for d in self.attached or () if d.process_index == jax.process_index())
        own = next(ours, self.devices[0])
        too_much = jax.ShapeDtypeStruct((2**42,), jnp.int8, sharding=SingleDeviceSharding(own))
        try:
            jax.jit(lambda x: x + 1).lower(too_much).compile()
        except jax.errors.JaxRuntimeError as error:
            found = Shortage.read(str(error))
            if found is not None:
                return found.limit
            raise
        raise AssertionError("no chip has 4 TiB of memory")


@dataclasses.dataclass(frozen=True)
class Shortage:
    """What the compiler says of a program that does not fit.

    Attributes:
        used: bytes that it needs on one device.
        limit: bytes that there are.
    """

    used: int
    limit: int

    @classmethod
    def read(cls, message: str) -> Shortage | None:
        """Reads an error of the compiler; None if it is another one.

        Of programs whose arguments alone are too large it says only how much these take.
        """
        if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
            return None
        size = r"([\d.]+)([BKMGT]?)"
        for form in (rf"Used {size} of {size}", rf"\({size}\) exceeds available HBM \({size}\)"):
            if found := re.search(form, message):
                used, unit, limit, limit_unit = found.groups()
                return cls(_bytes(used, unit), _bytes(limit, limit_unit))
        return None


def _written(cloud: str) -> str | None:
    """A slice that is named as Cloud TPU does, as we write it; None if it is none of its sizes.

    The chips are in a square or cube, or several of them beside each other.
    """
    found = _CLOUD.fullmatch(cloud)
    if found is None:
        return None
    slices, by_chips, by_cores, count = found.groups()
    chips = int(count) if by_chips else int(count) // 2
    name = (by_chips or by_cores).replace("litepod", "e")
    axes, doublings = CHIPS[name].axes, chips.bit_length() - 1
    if chips != 2**doublings or (int(count) % 2 and by_cores) or chips > CHIPS[name].pod:
        return None
    shape = [2 ** ((doublings + axis) // axes) for axis in range(axes)]
    if chips == 4:
        shape = [2, 2, 1][:axes]
    return f"{slices}{name}:{'x'.join(map(str, shape))}"


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** "BKMGT".index(unit or "B"))


@contextlib.contextmanager
def _ready_to_load() -> Iterator[None]:
    """Lets `libtpu` load where there is no TPU: without looking for one in the network, without
    its notices, and beside another process that has loaded it as well."""
    if not _attached():
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # What is written before its log begins goes to the file descriptor itself.
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _attached() -> bool:
    """Whether this machine has a TPU."""
    return Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
