"""Sharding of the unembedding head while a loop reads it chunk by chunk.

A head is large (128k x 4096 in bfloat16: 1 GiB) and is stored split over the devices. If few
devices share a copy of the weights, each computes the logits of its part of the vocabulary for the
targets of all of them: they exchange hidden states, and no device ever holds the whole head. The
exchange grows with the number of devices, while their other memory shrinks. Many devices therefore
gather the head once per step, and each keeps its own rows. Outside `jax.set_mesh` this module does
nothing.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

from prefix_jax.mesh import (
    HEAD_AXIS,
    SHARE_AXES,
    column_shards,
    constrain_tokens,
    row_shards,
    shards,
)

# Up to this many devices split the vocabulary. With the published peaks of v5e chips, the exchange
# is 1 % of a Llama-3-8B step on 16 of them if every token is a target, and 4 % on 64.
_FEW = 16
# Targets per chunk and device, if each device has the whole vocabulary. More would cost memory (512
# x 128k float32 logits are 256 MiB); fewer would make reading the head slower than its products (a
# TPU does some 250 operations in the time in which it reads a byte). A CPU does a tenth of that,
# and its memory is shared with programs and data.
_ALONE = 512
_ALONE_ON_CPU = 128
# Targets per chunk and device, if each device has a part of the vocabulary. Together the devices
# have enough targets for the products; fewer chunks mean fewer exchanges.
_TOGETHER = 128


def head(weights: Any, outputs: int) -> Any:
    """Shards the weights of a head for a loop over targets.

    Args:
        weights: a plain or quantised array.
        outputs: the vocabulary axis.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return weights

    def place(leaf: jax.Array) -> jax.Array:
        return _split(leaf, outputs) if _shared() else _gathered(leaf, outputs)

    return jax.tree.map(place, weights)


def rows(x: jax.Array) -> jax.Array:
    """Places an array of targets, rows first, on the devices that compute their logits."""
    if not _shared():
        return constrain_tokens(x)
    spec = PartitionSpec("data", *(None for _ in x.shape[1:]))
    return jax.lax.with_sharding_constraint(x, spec)


def chunk_targets() -> int:
    """Maximum number of targets per chunk, over all devices."""
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    alone = _ALONE_ON_CPU if device is not None and device.platform == "cpu" else _ALONE
    if not _shared():
        return alone * row_shards() * column_shards()
    return mesh.shape["data"] * max(alone, _TOGETHER * shards(mesh, SHARE_AXES))


def column_parts() -> int:
    """Number of parts that the columns of a chunk are split into: as for rows if each device has
    the whole vocabulary, else 1."""
    return 1 if _shared() else column_shards()


def _shared() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and 1 < shards(mesh, SHARE_AXES) <= _FEW


def _split(leaf: jax.Array, outputs: int) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    spec: list[Any] = [None] * leaf.ndim
    axes = (HEAD_AXIS, *SHARE_AXES)
    if leaf.shape[outputs] % shards(mesh, axes):
        # XLA exchanges only equal shares; unequal ones are sliced from the whole array.
        leaf = jax.lax.with_sharding_constraint(leaf, PartitionSpec(*spec))
    if leaf.shape[outputs] > 1:
        # The tensor axis comes first, so its split stays in place and is only subdivided.
        spec[outputs] = axes
    return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*spec))


def _gathered(leaf: jax.Array, outputs: int) -> jax.Array:
    spec: list[Any] = [None] * leaf.ndim
    spec[outputs] = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*spec))
