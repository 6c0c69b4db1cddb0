"""How a head lies on the mesh while a loop over targets reads it, chunk by chunk.

A head is large (128k x 4096 in bfloat16: 1 GiB), and lies split over the devices. Few devices that
share a copy of the weights take a part of the vocabulary each, for the targets of all of them: they
exchange hidden states, and none ever holds the head. What they exchange grows with their
number, while what else they hold shrinks: many gather the head, once a step, and keep their rows
apart. Outside of `jax.set_mesh` nothing happens.
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

# Up to so many devices take parts of the vocabulary. By the published peaks of v5e chips the
# exchange is 1 % of a Llama-3-8B's step for 16 of them if every token is a target, 4 % for 64.
_FEW = 16
# Targets of a chunk, on each device that has the whole vocabulary: more cost memory (512 x 128k
# float32 logits are 256 MiB); fewer would read the head more often than their products pay for (a
# TPU does some 250 operations in the time that it reads a byte). A CPU does a tenth of that, and
# its memory is where programs and data are, too.
_ALONE = 512
_ALONE_ON_CPU = 128
# And for each device that has a part: together they have enough for the products, and the fewer
# chunks, the fewer exchanges.
_TOGETHER = 128


def head(weights: Any, outputs: int) -> Any:
    """A head's weights as a loop over targets wants them.

    Args:
        weights: an array, or a quantised one.
        outputs: the axis of the vocabulary.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return weights

    def place(leaf: jax.Array) -> jax.Array:
        return _split(leaf, outputs) if _shared() else _gathered(leaf, outputs)

    return jax.tree.map(place, weights)


def rows(x: jax.Array) -> jax.Array:
    """An array of targets, rows first, on the devices that make logits of them."""
    if not _shared():
        return constrain_tokens(x)
    spec = PartitionSpec("data", *(None for _ in x.shape[1:]))
    return jax.lax.with_sharding_constraint(x, spec)


def chunk_targets() -> int:
    """How many targets a chunk has on all devices together, at most."""
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    alone = _ALONE_ON_CPU if device is not None and device.platform == "cpu" else _ALONE
    if not _shared():
        return alone * row_shards() * column_shards()
    return mesh.shape["data"] * max(alone, _TOGETHER * shards(mesh, SHARE_AXES))


def column_parts() -> int:
    """Into how many parts the columns of a chunk are split: as those of rows are, on devices that
    each have the whole vocabulary."""
    return 1 if _shared() else column_shards()


def _shared() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and 1 < shards(mesh, SHARE_AXES) <= _FEW


def _split(leaf: jax.Array, outputs: int) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    spec: list[Any] = [None] * leaf.ndim
    axes = (HEAD_AXIS, *SHARE_AXES)
    if leaf.shape[outputs] % shards(mesh, axes):
        # XLA exchanges equal shares alone; it cuts others from the whole.
        leaf = jax.lax.with_sharding_constraint(leaf, PartitionSpec(*spec))
    if leaf.shape[outputs] > 1:
        # What tensor splits stays where it is, and is cut once more.
        spec[outputs] = axes
    return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*spec))


def _gathered(leaf: jax.Array, outputs: int) -> jax.Array:
    spec: list[Any] = [None] * leaf.ndim
    spec[outputs] = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*spec))
