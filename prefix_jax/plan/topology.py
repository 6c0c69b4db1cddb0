"""TPU specs, and abstract devices for ahead-of-time compilation.

`libtpu` includes the compiler, so a machine without a TPU can compile for any of them.
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
    """Published peak figures of one chip.

    Attributes:
        bf16, int8: operations per second in matrix products.
        hbm: bytes of memory, of which the compiler reserves a little: see `hbm_limit`.
        bandwidth: bytes per second between memory and chip.
        link: bytes per second in each direction on one link to a neighbouring chip.
        ring: the minimum number of chips along an axis for which its ends are linked to a ring;
            shorter axes are lines.
        axes: the number of axes of a slice.
        pod: the maximum number of chips per slice.
        devices: the number of JAX devices per chip.
        dcn: bytes per second and chip on the data centre network between slices.
        options: compiler options that make devices look as they do to users of this chip.
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

# Chips by JAX's `device_kind`.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}

_NAME = re.compile(r"(?:(\d+)\*)?([a-z0-9]+):(\d+(?:x\d+)*)")
# Cloud TPU names of slices: by chips (v5litepod-16 is v5e:4x4), or by cores, two per chip (v5p-8 is
# v5p:2x2x1).
_CLOUD = re.compile(r"((?:\d+\*)?)(?:(v5e|v5litepod|v6e)|(v4|v5p))-(\d+)")
_EXAMPLES = "v5e:4x4 (16 chips), v5p:2x2x1, v5e:1x1 (one chip), 2*v5e:4x4 (two slices)"


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more slices of chips.

    Attributes:
        name: the chip, a key of `CHIPS`.
        shape: the number of chips along each axis of a slice.
        slices: the number of slices, connected by the data centre network.
        attached: real devices; None to compile for abstract ones.
    """

    name: str
    shape: tuple[int, ...]
    slices: int = 1
    attached: tuple[jax.Device, ...] | None = None

    @classmethod
    def parse(cls, text: str, slices: int | None = None) -> Topology:
        """Parses "v5e:4x4" or "2*v5e:4x4".

        Raises:
            MeshError: the text is not a valid topology.
        """
        match = _NAME.fullmatch(text.strip().lower())
        if not match:
            if written := _written(text.strip().lower()):
                raise MeshError(f"topology {text!r}: write its chips, {written}")
            raise MeshError(f"topology {text!r}: write it as one of {_EXAMPLES}")
        count, name, shape = match.groups()
        if name not in CHIPS:
            raise MeshError(f"topology {text}: the chip {name!r} is not one of {', '.join(CHIPS)}")
        sizes = tuple(map(int, shape.split("x")))
        axes = CHIPS[name].axes
        if len(sizes) != axes or not all(sizes):
            example = ":".join((name, "x".join("4" * axes)))
            raise MeshError(f"topology {text}: {name} has {axes} axes of chips, as in {example}")
        if math.prod(sizes) > CHIPS[name].pod:
            raise MeshError(
                f"topology {text}: a slice of {name} has at most {CHIPS[name].pod:,} chips; "
                "write several slices as 2*…"
            )
        if count is not None and slices not in (None, int(count)):
            raise MeshError(f"topology {text} has {count} slices, but {slices} are requested")
        number = int(count or (1 if slices is None else slices))
        if number < 1:
            raise MeshError(f"topology {text}: needs at least one slice, got {number}")
        return cls(name, sizes, number)

    @classmethod
    def of(cls, devices: Sequence[jax.Device]) -> Topology:
        """The topology of attached devices.

        Raises:
            MeshError: they are not TPUs, or of an unknown kind.
        """
        kind = devices[0].device_kind
        if kind not in _KINDS:
            raise MeshError(
                f"mesh: auto supports only TPUs ({', '.join(CHIPS)}), got {len(devices)} x {kind}; "
                f"set the sizes instead, as in mesh.fsdp={len(devices)}"
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
        """The figures of each chip."""
        return CHIPS[self.name]

    @property
    def chips(self) -> int:
        """The number of chips in all slices."""
        return math.prod(self.shape) * self.slices

    def together(self, devices: int) -> bool:
        """Whether a group of this many devices, which exchange activations in every layer, fits in
        one slice."""
        return devices <= len(self.devices) // self.slices

    @property
    def hosts(self) -> int:
        """The number of processes of attached devices; 1 for abstract devices, where it is
        unknown."""
        return len({device.process_index for device in self.attached or ()}) or 1

    @functools.cached_property
    def devices(self) -> Sequence[jax.Device]:
        """Devices to compile for.

        Raises:
            MeshError: `libtpu` is missing or does not support this topology.
        """
        if self.attached is not None:
            return self.attached
        if importlib.util.find_spec("libtpu") is None:
            raise MeshError(
                "libtpu, the compiler for TPUs, is not installed; "
                'run pip install "prefix_jax[tpu]" (no TPU is needed)'
            )
        asked: dict[str, Any] = dict(self.chip.options)
        # By default a host has 2x2 chips; a slice that is narrower along an axis is a single host.
        usual = (2, 2, 1)
        bounds = (*self.shape, *(1 for _ in range(3 - len(self.shape))))
        if any(size % host for size, host in zip(bounds, usual, strict=True)):
            asked["chips_per_host_bounds"] = bounds
        if self.slices > 1:
            asked["num_slices"] = self.slices
        try:
            with _ready_to_load():
                description = topologies.get_topology_desc(
                    f"{self.name}:{'x'.join(map(str, self.shape))}", "tpu", **asked
                )
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise MeshError(
                f"the TPU compiler does not support topology {self}: {reason(error)}"
            ) from None
        return description.devices

    def mesh(self, sizes: Mapping[str, int]) -> Mesh:
        """The devices as a `data` × `fsdp` × `sequence` × `tensor` mesh.

        Raises:
            MeshError: the product of the sizes is not the number of devices.
        """
        return make_mesh(**sizes, devices=self.devices)

    @functools.cached_property
    def hbm_limit(self) -> int:
        """Bytes of memory that the compiler allows a program on one device.

        Read from the error for a program that is too large, in a few hundredths of a second.
        """
        # With attached devices, use one of this host: it cannot compile only for other hosts'.
        ours = (d for d in self.attached or () if d.process_index == jax.process_index())
        own = next(ours, self.devices[0])
        too_much = jax.ShapeDtypeStruct((2**42,), jnp.int8, sharding=SingleDeviceSharding(own))
        try:
            jax.jit(lambda x: x + 1).lower(too_much).compile()
        except jax.errors.JaxRuntimeError as error:
            out_of_memory = OutOfMemory.parse(str(error))
            if out_of_memory is not None:
                return out_of_memory.limit
            raise
        raise AssertionError("no chip has 4 TiB of memory")


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """Out of memory, as reported by the compiler.

    Attributes:
        used: bytes that the program needs on one device.
        limit: bytes available.
    """

    used: int
    limit: int

    @classmethod
    def parse(cls, message: str) -> OutOfMemory | None:
        """Parses a compiler error; None if it is a different error.

        If the arguments by themselves are too large, the compiler reports only their size.
        """
        if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
            return None
        size = r"([\d.]+)([BKMGT]?)"
        for form in (rf"Used {size} of {size}", rf"\({size}\) exceeds available HBM \({size}\)"):
            if match := re.search(form, message):
                used, unit, limit, limit_unit = match.groups()
                return cls(_bytes(used, unit), _bytes(limit, limit_unit))
        return None


def _written(cloud: str) -> str | None:
    """Converts a Cloud TPU slice name to our notation; None if it is not a valid size.

    The chips form a square or cube, or several adjacent ones.
    """
    match = _CLOUD.fullmatch(cloud)
    if match is None:
        return None
    slices, by_chips, by_cores, count = match.groups()
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
    """Lets `libtpu` load without a TPU: without querying the network for one, without its notices,
    and while another process has it loaded."""
    if not _attached():
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Messages before its logging starts go directly to the file descriptor.
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
