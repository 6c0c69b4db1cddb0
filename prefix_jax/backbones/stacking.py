"""The two forms of per-layer trees, such as weights and caches.

stacked: one tree whose leaves have a leading L axis. The layers run in one `lax.scan`, so compile
time does not grow with depth. Training uses this form.

unstacked: a tuple of L trees. The layers run in a Python loop, so no step copies a layer out of the
stack. Decoding uses this form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from prefix_jax.prefix import Layers

Params = Mapping[str, Any]


def stack_layers(layers: Any) -> Any:
    """Stacks a sequence of equal trees, one per layer, along a leading L axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def as_stacked(layers: Any) -> Any:
    """Stacks the layers unless they are stacked already."""
    return stack_layers(layers) if isinstance(layers, tuple) else layers


def pick_layers(params: Params, layers: Layers) -> Params:
    """Selects the weights of some layers; all for None."""
    if layers is None:
        return params
    if isinstance(params["layers"], tuple):
        return {"layers": tuple(params["layers"][layer] for layer in layers)}
    index = jnp.array(layers)
    return {"layers": jax.tree.map(lambda leaf: leaf[index], params["layers"])}


def to_unstacked(params: Params) -> Params:
    """Converts the weights of a stack to layers in a tuple.

    Each leaf is freed after its conversion, so that a machine never holds a large model twice.
    `params["layers"]` cannot be used afterwards.
    """
    if isinstance(params["layers"], tuple):
        return params
    stacked, treedef = jax.tree.flatten(params["layers"])
    unstack = jax.jit(lambda leaf: tuple(leaf[layer] for layer in range(leaf.shape[0])))
    unstacked = []
    for leaf in stacked:
        unstacked.append(jax.block_until_ready(unstack(leaf)))
        leaf.delete()
    layers = tuple(jax.tree.unflatten(treedef, leaves) for leaves in zip(*unstacked, strict=True))
    return {**params, "layers": layers}


def to_stacked(params: Params) -> Params:
    """Converts the weights of a stack to stacked layers, like `to_unstacked` in reverse."""
    if not isinstance(params["layers"], tuple):
        return params
    treedef = jax.tree.structure(params["layers"][0])
    unstacked = zip(*(jax.tree.leaves(layer) for layer in params["layers"]), strict=True)
    stack = jax.jit(lambda *leaves: jnp.stack(leaves))
    stacked = []
    for leaves in unstacked:
        stacked.append(jax.block_until_ready(stack(*leaves)))
        for leaf in leaves:
            leaf.delete()
    return {**params, "layers": jax.tree.unflatten(treedef, stacked)}
