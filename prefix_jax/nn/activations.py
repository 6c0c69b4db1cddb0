"""Activations by the names that Hugging Face configs give them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from prefix_jax.errors import BackboneError

_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function of that name.

    Raises:
        BackboneError: no such activation; the message lists those there are.
    """
    if name not in _ACTIVATIONS:
        raise BackboneError(f"unknown activation {name!r}; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]
