"""Rematerialisation policies: which activations a layer keeps for its backward pass.

Activations worth keeping are named. Every name saves about the same work per byte (a product over a
D-wide input costs 2·D operations per output element), so the policies differ in how much they keep,
not in how well they choose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar, get_args

import jax
from jax.ad_checkpoint import checkpoint_name

Remat = Literal["none", "dots", "mlp", "projections", "attention", "full"]

# Outputs of the weight matrices, and "mixed": the output and log-denominators of attention.
Name = Literal["q", "k", "v", "mixed", "o", "up", "gate", "down"]

_KEPT: dict[Remat, tuple[Name, ...]] = {
    "dots": get_args(Name),
    "mlp": ("up", "gate"),
    "projections": ("q", "k", "v", "o", "up"),
    "attention": ("q", "k", "v", "mixed", "o"),
    "full": (),
}

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def keep(name: Name, x: jax.Array) -> jax.Array:
    """Names an array for rematerialisation policies; returns it unchanged."""
    return checkpoint_name(x, name)


def rematerialised(layer: Callable[Arguments, Result], remat: Remat) -> Callable[Arguments, Result]:
    """Applies a rematerialisation policy to a layer of a scan.

    The layer's input is always kept. In addition, `remat` keeps:

        dots         all products with weight matrices, and the output of attention
        mlp          the feed-forward's up and gate projections
        projections  q, k, v, o and up
        attention    q, k, v, o and the output of attention
        full         nothing: everything is recomputed
        none         everything: nothing is recomputed
    """
    if remat == "none":
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(*_KEPT[remat])
    # Inside a scan, XLA cannot merge the recomputation with the original.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def recomputed(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Recomputes a part of a scanned layer in the backward pass, under any policy."""
    return jax.checkpoint(function, prevent_cse=False)
