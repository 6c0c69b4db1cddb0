"""What a layer keeps for its backward pass, and what it computes again.

What is worth keeping bears a name. A byte kept saves about as much work under every name (a
product of a D-wide input saves 2·D operations for each number that it makes), so the policies
differ in how much they keep, not in how well they choose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar, get_args

import jax
from jax.ad_checkpoint import checkpoint_name

Remat = Literal["none", "dots", "mlp", "projections", "attention", "full"]

# What weight matrices make, and what attention mixes, with its log-denominators.
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
    """The same array, under a name by which policies know it."""
    return checkpoint_name(x, name)


def rematerialised(layer: Callable[Arguments, Result], remat: Remat) -> Callable[Arguments, Result]:
    """A layer of a scan, whose backward pass keeps its input and what `remat` names: every product
    of a weight matrix and the mix of attention ("dots"), those of the feed-forward alone ("mlp"),
    those of attention's matrices and of the feed-forward's first ("projections"), those of
    attention alone ("attention"), nothing ("full"); or all that it needs ("none")."""
    if remat == "none":
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(*_KEPT[remat])
    # Inside a scan XLA cannot merge the second computation with the first.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def recomputed(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A part of a layer of a scan whose backward pass computes it again, under any policy."""
    return jax.checkpoint(function, prevent_cse=False)
