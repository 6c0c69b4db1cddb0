"""Finds weights that are NaN or infinite."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from prefix_jax.nn.quantized import QTensor


def find_non_finite(params: Mapping[str, Any]) -> dict[tuple[str, ...], int]:
    """Finds the parameters with values that are NaN or infinite.

    Each parameter is read once on the devices that hold it. With several processes, every process
    must call this, and all get the same result.

    Args:
        params: the backbone's parameters; arrays may be sharded. For quantised parameters, the
            scales are checked: they are not finite if the weights were not.

    Returns:
        For the path of each such parameter, the first index of its first axis with such a value.
    """
    first_index = {}
    for path, leaf in flatten_dict(dict(params)).items():
        x = leaf.scale if isinstance(leaf, QTensor) else leaf
        finite = np.asarray(_compiled(x.sharding)(x))
        if not finite.all():
            first_index[path] = int(finite.argmin())
    return first_index


@functools.cache
def _compiled(sharding: jax.sharding.Sharding) -> Any:
    """A compiled function that checks each index of the first axis; replicated on a mesh."""
    if isinstance(sharding, NamedSharding):
        return jax.jit(_finite, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.jit(_finite)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))
