"""Checks that a run can fit in memory, and explains an allocation failure."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

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
    model: PrefixModel,
    examples: Sequence[Example],
    mesh: Mesh,
    *,
    batch_size: int,
    grad_accum_steps: int = 1,
    shared_sources: bool = False,
    optimizer: Literal["adamw", "adafactor"] = "adamw",
) -> None:
    """Compares the memory that training needs at least with what a device has, before allocating.

    It counts the trained parameters with their gradients and optimizer state, and the layer inputs
    that the backward pass reads. Both are lower bounds: a run that passes may still not fit.

    Args:
        model: backbone, method and head.
        examples: the training examples.
        mesh: the devices.
        batch_size: examples per step.
        grad_accum_steps: micro-batches per step.
        shared_sources: whether examples in a row share the tokens of their source.
        optimizer: determines the size of the optimizer state.

    Raises:
        ConfigError: training needs more than there is; the message names the settings to change.
    """
    room = device_memory(mesh)
    if room is None:
        return
    method, geometry = model.method, model.backbone.geometry
    if method is not None:
        params = jax.eval_shape(lambda: method.init(jax.random.key(0), geometry, None))
        # Parameters, gradients and moments: AdamW has two, Adafactor one.
        copies = 4 if optimizer == "adamw" else 3
        needed = copies * sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(params))
        if needed > room:
            sizes = {
                f"method.{name}": value
                for name, value in vars(method).items()
                if isinstance(value, int) and not isinstance(value, bool)
            }
            largest = sorted(sizes.items(), key=lambda item: -item[1])
            raise ConfigError(
                f"{', '.join(f'{name} {value}' for name, value in largest[:3])}: the trained "
                f"parameters need {_size(needed)} with gradients and optimizer state, but a device "
                f"has {_size(room)}; lower {largest[0][0]}"
            )
    if shared_sources or not examples:
        return
    tokens = sum(
        len(e.ids_T if e.source_ids_S is None else e.source_ids_S) for e in examples
    ) / len(examples)
    rows = batch_size / grad_accum_steps / batch_shards(mesh)
    layers = geometry.main.layers if getattr(method, "layers", None) is None else 1
    needed = int(rows * tokens * geometry.d_model * layers * 2 / shards(mesh, ("sequence",)))
    if needed > room:
        raise ConfigError(
            f"data.batch_size {batch_size}: a step needs at least {_size(needed)} per device, "
            f"but a device has {_size(room)}; {_REMEDY}"
        )


def device_memory(mesh: Mesh) -> int | None:
    """Total bytes of one device; None if unknown. CPU devices share the host's memory."""
    device = mesh.local_devices[0] if mesh.local_devices else None
    if device is None:
        return None
    stats: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # platforms without statistics raise various errors
        stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform != "cpu":
        return None
    host = _host_memory()
    return None if host is None else host // len(mesh.local_devices)


@contextlib.contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turns an allocation failure, of the host or a device, into a ConfigError."""
    try:
        yield
    except MemoryError as error:
        raise ConfigError(f"the host is out of memory ({error}); {_REMEDY}") from error
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "Out of memory" not in text:
            raise
        first = text.strip().splitlines()[0][:200]
        raise ConfigError(f"the devices are out of memory ({first}); {_REMEDY}") from error


def _host_memory() -> int | None:
    """Bytes of the host's memory, or the limit of this container."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(_CGROUP_LIMIT.read_text()))
    return total


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
