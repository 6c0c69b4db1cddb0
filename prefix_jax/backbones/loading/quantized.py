"""Quantises the weights of a backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import path_aware_map

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.stacking import Params
from prefix_jax.nn.quantized import Quantize, quantize

# The weights that are quantised, with the axes that their product sums over. Axes count from the
# end, so that they hold for stacked layers too. Norms, biases and small tables stay unquantised.
_INPUTS: Mapping[str, tuple[int, ...]] = {
    "q_DNH": (-3,),
    "k_DKH": (-3,),
    "v_DKH": (-3,),
    "o_NHD": (-3, -2),
    "up_DF": (-2,),
    "gate_DF": (-2,),
    "down_FD": (-2,),
    "tokens_VD": (-1,),
    "unembed_DV": (-2,),
}
# Quantised to int8 only.
_TABLES = ("tokens_VD", "unembed_DV")
# Inputs that share a scale in int4, as in GGUF's 4-bit blocks.
GROUP = 32


def quantize_params(params: Params, how: Quantize) -> Params:
    """Replaces the matrices of a backbone by `QTensor`s.

    To quantise a checkpoint while it is loaded, use `load(…, quantize=…)`.

    Args:
        params: unquantised stacked weights.
        how: "int8" has one scale per output or, in token tables, per token. "int4" has a scale and
            a zero per `GROUP` inputs of an output, with token tables in int8. "none" changes
            nothing.
    """

    def convert(path: tuple[Any, ...], leaf: Any) -> Any:
        inputs = _INPUTS.get(path[-1])
        if inputs is None:
            return leaf
        blocks = list(leaf.shape)
        for axis in inputs:
            blocks[axis] = 1
        if how == "int8" or path[-1] in _TABLES:
            return quantize(leaf, 8, blocks, leaf.dtype)
        # Groups are consecutive along the last input axis, at one index of the others.
        for axis in inputs:
            blocks[axis] = leaf.shape[axis]
        blocks[inputs[-1]] //= math.gcd(GROUP, leaf.shape[inputs[-1]])
        return quantize(leaf, 4, blocks, leaf.dtype)

    if how == "none":
        return params
    converted: Params = path_aware_map(convert, dict(params))
    return converted


def abstract_params(
    backbone: Backbone, dtype: jax.typing.DTypeLike = jnp.float32, how: Quantize = "none"
) -> Params:
    """The shapes and dtypes of stacked weights.

    Args:
        backbone: the computation.
        dtype: the dtype of weights and scales.
        how: the quantisation; see `quantize_params`.
    """

    def make(rng: jax.Array) -> Params:
        return quantize_params(backbone.init(rng, dtype), how)

    abstract: Params = jax.eval_shape(make, jax.random.key(0))
    return abstract
