"""Fingerprints of weights, by which a stored prefix identifies its backbone."""

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

from prefix_jax.nn.quantized import QTensor

_SCHEME = b"prefix_jax fingerprint 1"
_TINY = 2.0**-126  # the smallest normal number; some backends flush smaller numbers to zero
_FACTORS = (40503, 31337, 52711, 60493)
_PART = 1 << 20  # values at a time


def fingerprint(params: Mapping[str, Any]) -> str:
    """Hashes the path, the shape and checksums of all values of every parameter.

    The checksums are integer sums over the values' bits, each multiplied by a hash of its
    position. Integer sums are exact in any order, so the result does not depend on the mesh. They
    are computed where the weights are, and only one number for each entry of a parameter's first
    axis leaves the devices.

    Values are rounded to bfloat16 first, so that one checkpoint has one fingerprint whether it was
    loaded in float32 or in bfloat16, from one file or from shards. A quantised copy has the
    fingerprint of its integers and scales, which are the same in either dtype.

    Args:
        params: the backbone's parameters, layers stacked; arrays may be sharded.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256(_SCHEME)
    quantised = jax.tree.map(_fields, dict(params), is_leaf=_is_quantised)
    for path, leaf in sorted(flatten_dict(quantised, sep="/").items()):
        whole = leaf.sharding.shard_shape(leaf.shape)[:1] == leaf.shape[:1]
        in_turn = whole and leaf.dtype != jnp.bfloat16
        checksums = np.asarray(_compiled(leaf.sharding, in_turn)(leaf), "<u2")
        digest.update(f"{path} {leaf.shape}\n".encode())
        digest.update(checksums.tobytes())
    return digest.hexdigest()[:32]


def _is_quantised(node: Any) -> bool:
    return isinstance(node, QTensor)


def _fields(leaf: Any) -> Any:
    if not _is_quantised(leaf):
        return leaf
    return {name: x for name, x in vars(leaf).items() if x is not None}


@functools.cache
def _compiled(sharding: jax.sharding.Sharding, in_turn: bool) -> Any:
    """The compiled checksums, replicated on a mesh so that every process can read them."""
    checksums = functools.partial(_checksums, in_turn=in_turn)
    if isinstance(sharding, NamedSharding):
        return jax.jit(checksums, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.jit(checksums)


def _checksums(x: jax.Array, in_turn: bool) -> jax.Array:
    """A uint16 per entry of the first axis, which depends on each value and its position.

    Args:
        x: a parameter.
        in_turn: whether to process the entries in parts. XLA on CPU materialises the summands,
            which for a whole float32 parameter would be half its size. Not possible if the first
            axis is sharded, and not useful for bfloat16, for which XLA on CPU would keep a float32
            copy during the loop.
    """
    count = len(x)
    size = min(count, max(1, _PART // (x.size // count))) if in_turn else count

    def part(turn: jax.Array, sums: jax.Array) -> jax.Array:
        start = jnp.minimum(turn * size, count - size)  # the last part overlaps the one before
        entries = jax.lax.dynamic_slice_in_dim(x, start, size)
        checksums = jax.vmap(_checksum)(entries, (start + jnp.arange(size)).astype(jnp.uint16))
        return jax.lax.dynamic_update_slice_in_dim(sums, checksums, start, axis=0)

    return jax.lax.fori_loop(0, -(-count // size), part, jnp.zeros(count, jnp.uint16))


def _checksum(entry: jax.Array, index: jax.Array) -> jax.Array:
    if jnp.issubdtype(entry.dtype, jnp.integer):
        entry = entry.astype(jnp.bfloat16)  # exact for int8 and int4
    rounded = jnp.where(jnp.abs(entry) < _TINY, 0, entry).astype(jnp.bfloat16)
    bits = jax.lax.bitcast_convert_type(rounded, jnp.uint16)
    place = jnp.broadcast_to(index * jnp.uint16(_FACTORS[0]), entry.shape)
    for axis, factor in zip(range(entry.ndim), _FACTORS[1:], strict=False):
        place += jax.lax.broadcasted_iota(jnp.uint16, entry.shape, axis) * jnp.uint16(factor)
    place = (place ^ (place >> 7)) * jnp.uint16(_FACTORS[0]) | jnp.uint16(1)
    return jnp.sum((bits + 1) * place, dtype=jnp.uint16)
