"""Checks that a run can fit in memory, and reports when it did not."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from prefix_jax.config import Config
from prefix_jax.data.batch import Example
from prefix_jax.errors import ConfigError
from prefix_jax.mesh import batch_shards, shards
from prefix_jax.model import PrefixModel

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_REMEDY = (
    "lower data.batch_size (or raise optim.grad_accum_steps), data.max_length or the sizes of the "
    "method, set model.remat or model.quantize, or split over more devices with mesh.fsdp; "
    "prefix-jax plan shows what fits"
)


def check_memory(
    config: Config, model: PrefixModel, examples: Sequence[Example], mesh: Mesh
) -> None:
    """Compares the least memory that training needs with what a device has, before allocating.

    What is counted are the trained parameters with gradients and the optimizer's moments, and the
    layers' inputs that the backward pass reads. Both are lower bounds: a run that passes may still
    not fit.

    Args:
        config: the run.
        model: backbone, method and head.
        examples: to train on.
        mesh: the devices.

    Raises:
        ConfigError: more is needed than there is; the message names the settings.
    """
    room = device_memory(mesh)
    if room is None:
        return
    method, geometry = model.method, model.backbone.geometry
    if method is not None:
        params = jax.eval_shape(lambda: method.init(jax.random.key(0), geometry, None))
        # A gradient and AdamW's two moments besides; Adafactor has one.
        copies = 4 if config.optim.name == "adamw" else 3
        needed = copies * sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(params))
        if needed > room:
            sizes = {
                f"method.{name}": value
                for name, value in vars(method).items()
                if isinstance(value, int) and not isinstance(value, bool)
            }
            largest = sorted(sizes.items(), key=lambda item: -item[1])
            raise ConfigError(
                f"{', '.join(f'{name} {value}' for name, value in largest[:3])}: what trains "
                f"needs {_size(needed)} with its gradient and the optimizer's state, and a device "
                f"has {_size(room)}; lower {largest[0][0]}"
            )
    if config.data.group_by_source or not examples:
        return  # examples share tokens there
    tokens = sum(
        len(e.ids_T if e.source_ids_S is None else e.source_ids_S) for e in examples
    ) / len(examples)
    rows = config.data.batch_size / config.optim.grad_accum_steps / batch_shards(mesh)
    layers = geometry.main.layers if getattr(method, "layers", None) is None else 1
    needed = int(rows * tokens * geometry.d_model * layers * 2 / shards(mesh, ("sequence",)))
    if needed > room:
        raise ConfigError(
            f"data.batch_size {config.data.batch_size}: a step needs at least {_size(needed)} per "
            f"device, and a device has {_size(room)}; {_REMEDY}"
        )


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that one device of the mesh has in all; None if nobody says.

    Devices on the host's processor share the host's memory.
    """
    device = mesh.local_devices[0] if mesh.local_devices else None
    if device is None:
        return None
    stats: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # platforms without statistics raise what they like
        stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform != "cpu":
        return None
    host = _host_memory()
    return None if host is None else host // len(mesh.local_devices)


@contextlib.contextmanager
def out_of_memory() -> Iterator[None]:
    """Turns an exhausted memory, of the host or a device, into one error.

    Raises:
        ConfigError: an allocation failed.
    """
    try:
        yield
    except MemoryError as error:
        raise ConfigError(f"the host's memory is exhausted ({error}); {_REMEDY}") from error
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "Out of memory" not in text:
            raise
        first = text.strip().splitlines()[0][:200]
        raise ConfigError(f"the devices' memory is exhausted ({first}); {_REMEDY}") from error


def _host_memory() -> int | None:
    """Bytes of the host's memory, or of this process's share of it (a container's limit)."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(_CGROUP_LIMIT.read_text()))
    return total


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
