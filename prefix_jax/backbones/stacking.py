"""The two forms that the layers of a stack come in, weights and what else there is one of a layer.

stacked   one tree whose leaves have a leading L axis. The layers are one `lax.scan`, so that
compile time does not grow with depth: the form for training.
unstacked    a tuple of L trees. The layers are a Python loop, so that no step copies a layer
out of the stack: the form for decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from prefix_jax.prefix import Layers

Params = Mapping[str, Any]


def stack_layers(layers: Any) -> Any:
    """Trees of one structure, one a layer, as one tree with a leading L axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def as_stacked(layers: Any) -> Any:
    """The same for layers that are stacked already."""
    return stack_layers(layers) if isinstance(layers, tuple) else layers


def pick_layers(params: Params, layers: Layers) -> Params:
    """The weights of some layers."""
    if layers is None:
        return params
    if isinstance(params["layers"], tuple):
        return {"layers": tuple(params["layers"][layer] for layer in layers)}
    index = jnp.array(layers)
    return {"layers": jax.tree.map(lambda leaf: leaf[index], params["layers"])}


def to_unstacked(params: Params) -> Params:
    """A stack's weights with their layers in a tuple.

    Leaf by leaf, each one freed once it is converted, so that no machine holds a large model
    twice: `params["layers"]` cannot be used afterwards.
    """
    if isinstance(params["layers"], tuple):
        return params
    stacked, treedef = jax.tree.flatten(params["layers"])
    split = jax.jit(lambda leaf: tuple(leaf[layer] for layer in range(leaf.shape[0])))
    columns = []
    for leaf in stacked:
        columns.append(jax.block_until_ready(split(leaf)))
        leaf.delete()
    layers = tuple(jax.tree.unflatten(treedef, leaves) for leaves in zip(*columns, strict=True))
    return {**params, "layers": layers}


def to_stacked(params: Params) -> Params:
    """A stack's weights with their layers stacked: undoes `to_unstacked`, in the same way."""
    if not isinstance(params["layers"], tuple):
        return params
    treedef = jax.tree.structure(params["layers"][0])
    columns = zip(*(jax.tree.leaves(layer) for layer in params["layers"]), strict=True)
    join = jax.jit(lambda *leaves: jnp.stack(leaves))
    stacked = []
    for leaves in columns:
        stacked.append(jax.block_until_ready(join(*leaves)))
        for leaf in leaves:
            leaf.delete()
    return {**params, "layers": jax.tree.unflatten(treedef, stacked)}
