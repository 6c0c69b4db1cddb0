"""Zigzag layout of the columns of a row over the devices that share it.

In causal attention, late columns attend to the most keys. To balance the work, a row is cut into 2C
pieces and each of C devices gets two, one from either end. Rows are permuted before the first layer
and restored after the last; column-wise operations are unaffected. Attention gathers the keys of
all columns, which are small under grouped-query attention, and compares positions or, in kernels,
original columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from prefix_jax.mesh import BATCH_AXES, COLUMN_AXIS, column_shards, row_shards

Tree = TypeVar("Tree")


def pieces(shards: int) -> np.ndarray:
    """The order of a row's 2C pieces in zigzag layout: 0, 2C-1, 1, 2C-2 and so on."""
    first = np.arange(shards)
    return np.stack([first, 2 * shards - 1 - first], axis=1).reshape(-1)


def original_columns(columns: int, shards: int) -> np.ndarray:
    """The original column of each column of a zigzag row, int32 [columns]."""
    return np.arange(columns, dtype=np.int32).reshape(2 * shards, -1)[pieces(shards)].reshape(-1)


def pad(tree: Tree) -> Tree:
    """Pads arrays [B, T, …] with zero columns until T is divisible by 2C. Returns them unchanged if
    no devices share rows."""
    multiple = 2 * column_shards() if column_shards() > 1 else 1

    def pad_array(x_BT: jax.Array) -> jax.Array:
        more = -x_BT.shape[1] % multiple
        return jnp.pad(x_BT, [(0, 0), (0, more)] + [(0, 0)] * (x_BT.ndim - 2)) if more else x_BT

    padded: Tree = jax.tree.map(pad_array, tree)
    return padded


def applies_to(columns: int) -> bool:
    """True if devices share rows and can share a row of this many columns in zigzag layout."""
    return column_shards() > 1 and columns % (2 * column_shards()) == 0


def permute(tree: Tree) -> Tree:
    """Permutes arrays [B, T, …] into zigzag layout; T is a multiple of 2C. Differentiable."""
    permuted: Tree = jax.tree.map(functools.partial(_exchange, _permute), tree)
    return permuted


def restore(tree: Tree) -> Tree:
    """Undoes `permute`."""
    restored: Tree = jax.tree.map(functools.partial(_exchange, _restore), tree)
    return restored


def reorder(x: jax.Array, shards: int, axis: int, back: bool) -> jax.Array:
    """Permutes an array that holds all columns into zigzag order or, with `back`, out of it."""
    order = pieces(shards)
    shape = x.shape
    x = x.reshape(*shape[:axis], len(order), -1, *shape[axis + 1 :])
    return x.take(np.argsort(order) if back else order, axis=axis).reshape(shape)


def _exchange(function: Callable[[jax.Array, int], jax.Array], x_BT: jax.Array) -> jax.Array:
    rows = None if x_BT.shape[0] % row_shards() else BATCH_AXES
    spec = PartitionSpec(rows, COLUMN_AXIS)
    shards = column_shards()
    return jax.shard_map(lambda x_BT: function(x_BT, shards), in_specs=spec, out_specs=spec)(x_BT)


def _routes(shards: int) -> tuple[list[tuple[int, int]], ...]:
    """(source, destination) pairs for the first and the second piece that each device holds of a
    row in original order. No two first pieces go to the same device: even pieces in the first half
    go to even devices, those in the second half to odd ones."""

    def owner(piece: int) -> int:
        return min(piece, 2 * shards - 1 - piece)

    return tuple([(device, owner(2 * device + n)) for device in range(shards)] for n in (0, 1))


def _permute(x_BT: jax.Array, shards: int) -> jax.Array:
    halves = jnp.split(x_BT, 2, axis=1)
    even, odd = (
        jax.lax.ppermute(half, COLUMN_AXIS, route)
        for half, route in zip(halves, _routes(shards), strict=True)
    )
    return _swap_on_odd_devices(even, odd)


def _restore(x_BT: jax.Array, shards: int) -> jax.Array:
    # Even devices hold their even piece first, odd devices hold it last.
    even_odd = jnp.split(_swap_on_odd_devices(*jnp.split(x_BT, 2, axis=1)), 2, axis=1)
    halves = (
        jax.lax.ppermute(half, COLUMN_AXIS, [(to, source) for source, to in route])
        for half, route in zip(even_odd, _routes(shards), strict=True)
    )
    return jnp.concatenate(list(halves), axis=1)


def _swap_on_odd_devices(left: jax.Array, right: jax.Array) -> jax.Array:
    """Concatenates both, in reverse order on odd devices."""
    odd = jax.lax.axis_index(COLUMN_AXIS) % 2 == 1
    first, second = jnp.where(odd, right, left), jnp.where(odd, left, right)
    return jnp.concatenate([first, second], axis=1)
