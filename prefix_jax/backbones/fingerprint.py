"""A name for a backbone's weights, by which a stored prefix knows its own."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

_SCHEME = b"prefix_jax fingerprint 1"
_TINY = 2.0**-126  # the smallest normal number; some backends flush what is smaller to zero
_FACTORS = (40503, 31337, 52711, 60493)


def fingerprint(params: Mapping[str, Any]) -> str:
    """Hashes the path, the shape and checksums of all values of every parameter.

    The checksums are integer sums over the values' bits, each multiplied by a hash of its
    position. Integer sums are exact in any order, so the result does not depend on the mesh. They
    are computed where the weights are, and only one number for each entry of a parameter's first
    axis leaves the devices.

    Values are rounded to bfloat16 first, so that one checkpoint has one fingerprint whether it was
    loaded in float32 or in bfloat16, from one file or from shards. A quantised copy has other
    weights, and another fingerprint.

    Args:
        params: the backbone's parameters, layers stacked; arrays may be sharded.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256(_SCHEME)
    for path, leaf in sorted(flatten_dict(dict(params), sep="/").items()):
        # One by one: XLA on CPU writes out what it sums, half a float32 parameter.
        checksums = np.asarray(_compiled(leaf.sharding)(leaf), "<u2")
        digest.update(f"{path} {leaf.shape}\n".encode())
        digest.update(checksums.tobytes())
    return digest.hexdigest()[:32]


@functools.cache
def _compiled(sharding: jax.sharding.Sharding) -> Any:
    """The checksums, replicated on a mesh so that each of its processes can read them."""
    if isinstance(sharding, NamedSharding):
        return jax.jit(_checksums, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.jit(_checksums)


def _checksums(x: jax.Array) -> jax.Array:
    """A uint16 for every entry of the first axis, which depends on each value and its place."""
    rounded = jnp.where(jnp.abs(x) < _TINY, 0, x).astype(jnp.bfloat16)
    bits = jax.lax.bitcast_convert_type(rounded, jnp.uint16)
    place = jnp.zeros(x.shape, jnp.uint16)
    for axis, factor in zip(range(x.ndim), _FACTORS, strict=False):
        place += jax.lax.broadcasted_iota(jnp.uint16, x.shape, axis) * jnp.uint16(factor)
    place = (place ^ (place >> 7)) * jnp.uint16(_FACTORS[0]) | jnp.uint16(1)
    return jnp.sum((bits + 1) * place, axis=tuple(range(1, x.ndim)), dtype=jnp.uint16)
