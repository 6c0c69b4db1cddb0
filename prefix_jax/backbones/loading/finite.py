"""Finds weights that are NaN or infinite, where they are."""

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

    Each parameter is read once where it is, at the speed of its memory. With several processes,
    every process calls this and gets the same result.

    Args:
        params: the backbone's parameters; arrays may be sharded. Of a quantised one, the scales
            are read: they are not finite where the weights were not.

    Returns:
        By the path of each such parameter, the first entry of its first axis that has one.
    """
    found = {}
    for path, leaf in flatten_dict(dict(params)).items():
        x = leaf.scale if isinstance(leaf, QTensor) else leaf
        finite = np.asarray(_compiled(x.sharding)(x))
        if not finite.all():
            found[path] = int(finite.argmin())
    return found


@functools.cache
def _compiled(sharding: jax.sharding.Sharding) -> Any:
    """Whether each entry of the first axis is finite, replicated on a mesh."""
    if isinstance(sharding, NamedSharding):
        return jax.jit(_finite, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.jit(_finite)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))
