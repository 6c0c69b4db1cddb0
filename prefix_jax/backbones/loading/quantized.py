"""Which weights of a backbone are quantised, and how."""

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

# The axes that a product sums over, of every weight that is quantised: counted from the end, so
# that they hold for one layer and for a stack of them. What is missing here, norms, biases and
# small tables, stays as it is.
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
# Stay in int8.
_TABLES = ("tokens_VD", "unembed_DV")
# Inputs that share a scale in int4: as many as in a GGUF's blocks of 4 bits.
GROUP = 32


def quantize_params(params: Params, how: Quantize) -> Params:
    """A backbone's weights with their matrices quantised, each a `QTensor` in its place.

    Whoever loads a checkpoint wants `load(…, quantize=…)`, which quantises tensor by tensor.

    Args:
        params: plain weights, stacked.
        how: "int8" is one scale for every output, of the tables for every token. "int4" is a scale
            and a zero for every `GROUP` inputs of an output, and leaves the tables in int8. "none"
            changes nothing.
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
        # Groups lie along the last of them, within one index of the others.
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
    """The weights' shapes and dtypes, stacked, without any weights.

    Args:
        backbone: the computation.
        dtype: of the weights, and of the scales of what is quantised.
        how: how they are quantised.
    """

    def make(rng: jax.Array) -> Params:
        return quantize_params(backbone.init(rng, dtype), how)

    abstract: Params = jax.eval_shape(make, jax.random.key(0))
    return abstract
