"""Zigzag layout of the columns of a row over the devices that share it.

In causal attention late columns see the most keys. To balance the work, a row is cut into 2C pieces
and each of C devices gets two of them, one from either end. Rows are dealt out before the first
layer and restored after the last; column-wise operations are unaffected. Attention gathers the keys
of all columns, which are small under grouped-query attention, and compares positions or, in
kernels, original columns.
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
    """The order of a row's 2C pieces after dealing: 0, 2C-1, 1, 2C-2 and so on."""
    first = np.arange(shards)
    return np.stack([first, 2 * shards - 1 - first], axis=1).reshape(-1)


def origin(columns: int, shards: int) -> np.ndarray:
    """The original column at each place of a dealt row, int32 [columns]."""
    return np.arange(columns, dtype=np.int32).reshape(2 * shards, -1)[pieces(shards)].reshape(-1)


def fill(tree: Tree) -> Tree:
    """Pads arrays [B, T, …] with zero columns until devices can share them, dealt out or in order.
    Returns them unchanged if no devices share rows."""
    multiple = 2 * column_shards() if column_shards() > 1 else 1

    def pad(x_BT: jax.Array) -> jax.Array:
        more = -x_BT.shape[1] % multiple
        return jnp.pad(x_BT, [(0, 0), (0, more)] + [(0, 0)] * (x_BT.ndim - 2)) if more else x_BT

    padded: Tree = jax.tree.map(pad, tree)
    return padded


def can_deal(columns: int) -> bool:
    """True if devices share rows and a row of this many columns can be dealt out to them."""
    return column_shards() > 1 and columns % (2 * column_shards()) == 0


def deal(tree: Tree) -> Tree:
    """Deals out the columns of arrays [B, T, …]; T is a multiple of 2C. Differentiable."""
    dealt: Tree = jax.tree.map(functools.partial(_exchange, _deal), tree)
    return dealt


def undeal(tree: Tree) -> Tree:
    """Undoes `deal`."""
    whole: Tree = jax.tree.map(functools.partial(_exchange, _undeal), tree)
    return whole


def reorder(x: jax.Array, shards: int, axis: int, back: bool) -> jax.Array:
    """Permutes an array that holds all columns into dealt order or, with `back`, out of it."""
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
    row in order. No two first pieces go to the same device: even pieces before the middle go to
    even devices, those after it to odd ones."""

    def owner(piece: int) -> int:
        return min(piece, 2 * shards - 1 - piece)

    return tuple([(device, owner(2 * device + n)) for device in range(shards)] for n in (0, 1))


def _deal(x_BT: jax.Array, shards: int) -> jax.Array:
    halves = jnp.split(x_BT, 2, axis=1)
    even, odd = (
        jax.lax.ppermute(half, COLUMN_AXIS, route)
        for half, route in zip(halves, _routes(shards), strict=True)
    )
    return _in_order(even, odd)


def _undeal(x_BT: jax.Array, shards: int) -> jax.Array:
    # Even devices hold their even piece first, odd devices hold it last.
    even_odd = jnp.split(_in_order(*jnp.split(x_BT, 2, axis=1)), 2, axis=1)
    back = (
        jax.lax.ppermute(half, COLUMN_AXIS, [(to, source) for source, to in route])
        for half, route in zip(even_odd, _routes(shards), strict=True)
    )
    return jnp.concatenate(list(back), axis=1)


def _in_order(one: jax.Array, other: jax.Array) -> jax.Array:
    """Concatenates both, in reverse order on odd devices."""
    odd = jax.lax.axis_index(COLUMN_AXIS) % 2 == 1
    first, second = jnp.where(odd, other, one), jnp.where(odd, one, other)
    return jnp.concatenate([first, second], axis=1)
