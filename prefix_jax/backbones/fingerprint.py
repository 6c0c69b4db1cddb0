"""A name for a backbone's weights, by which a stored prefix knows its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

_SCHEME = b"prefix_jax fingerprint 1"
_TINY = 2.0**-126  # the smallest normal number; some backends flush what is smaller to zero
_PRIMES = (2654435761, 2246822519, 3266489917, 668265263)


def fingerprint(params: Mapping[str, Any]) -> str:
    """Hashes the path, the shape and a checksum of all values of every parameter.

    The checksums are integer sums over the values' bits, each multiplied by a hash of its
    position. Integer sums are exact in any order, so the result does not depend on the mesh; they
    run where the weights are, in one pass, and only one number a parameter leaves the devices.

    Values are rounded to bfloat16 first, so that one checkpoint has one fingerprint whether it was
    loaded in float32 or in bfloat16, from one file or from shards. A quantised copy has other
    weights, and another fingerprint.

    Args:
        params: the backbone's parameters, layers stacked; arrays may be sharded.

    Returns:
        32 hexadecimal digits.
    """
    leaves = sorted(flatten_dict(dict(params), sep="/").items())
    sharding = leaves[0][1].sharding
    replicated = None
    if isinstance(sharding, NamedSharding):  # Other processes of a mesh must read the sums, too.
        replicated = NamedSharding(sharding.mesh, PartitionSpec())
    sums = jax.jit(_checksums, out_shardings=replicated)([leaf for _, leaf in leaves])
    digest = hashlib.sha256(_SCHEME)
    for (path, leaf), checksum in zip(leaves, jax.device_get(sums), strict=True):
        digest.update(f"{path} {leaf.shape} {checksum}\n".encode())
    return digest.hexdigest()[:32]


def _checksums(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(x) for x in arrays])


def _checksum(x: jax.Array) -> jax.Array:
    """A uint32 that depends on every value and its position."""
    rounded = jnp.where(jnp.abs(x) < _TINY, 0, x).astype(jnp.bfloat16)
    bits = jax.lax.bitcast_convert_type(rounded, jnp.uint16).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, prime in zip(range(x.ndim), _PRIMES, strict=False):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(prime)
    place = (place ^ (place >> 15)) * jnp.uint32(_PRIMES[1]) | 1
    return jnp.sum((bits + 1) * place, dtype=jnp.uint32)
