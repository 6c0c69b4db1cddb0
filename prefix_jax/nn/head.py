"""A small layer on top of a backbone that maps hidden states to the answers of a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from prefix_jax.nn.activations import activation
from prefix_jax.validation import Fraction, Size

Params = Mapping[str, Any]

# The standard deviation of initial head weights in transformers.
_STD = 0.02


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear layer on hidden states, optionally after a dense layer.

    P-tuning v2 (Liu et al. 2022) and PEFT's `modules_to_save` train it together with the prefix.
    Which head a task has on which model is decided in `tasks/`.

    Attributes:
        outputs: the number of outputs Y per hidden state.
        activation: the activation of a dense layer D → D before the last layer; None for no such
            layer.
        pooled: whether the head reads the output of the backbone's pretrained pooler (BERT), which
            stays frozen.
        bias: whether the last layer has a bias.
        dropout: the dropout rate on the input of the last layer in training.
        drop_input: whether dropout also applies to the input of the dense layer.
        soft: whether the head reads the first soft token before an encoder instead of the text's
            first token, as PEFT does for classification.
    """

    outputs: Size
    activation: str | None = None
    pooled: bool = False
    bias: bool = True
    dropout: Fraction = 0.0
    drop_input: bool = True
    soft: bool = False

    def shapes(self, d_model: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every parameter for a backbone of width D."""
        shapes: dict[str, tuple[int, ...]] = {"out_DY": (d_model, self.outputs)}
        if self.bias:
            shapes["out_bias_Y"] = (self.outputs,)
        if self.activation is not None:
            shapes |= {"dense_DE": (d_model, d_model), "dense_bias_E": (d_model,)}
        return shapes

    def init(self, rng: jax.Array, d_model: int) -> Params:
        """Returns initial parameters in float32: normally distributed weights and zero biases."""
        dense_rng, out_rng = jax.random.split(rng)
        params = {"out_DY": _STD * jax.random.normal(out_rng, (d_model, self.outputs))}
        if self.bias:
            params["out_bias_Y"] = jnp.zeros((self.outputs,))
        if self.activation is not None:
            params["dense_DE"] = _STD * jax.random.normal(dense_rng, (d_model, d_model))
            params["dense_bias_E"] = jnp.zeros((d_model,))
        return params

    def __call__(self, params: Params, h_BMD: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Maps (pooled) hidden states to out_BMY in float32. With `rng`, applies dropout."""
        first, last = (None, None) if rng is None else jax.random.split(rng)
        h_BMD = h_BMD.astype(jnp.float32)
        if self.activation is not None:
            if self.drop_input:
                h_BMD = self._drop(h_BMD, first)
            h_BMD = activation(self.activation)(h_BMD @ params["dense_DE"] + params["dense_bias_E"])
        out_BMY = self._drop(h_BMD, last) @ params["out_DY"]
        return out_BMY + params["out_bias_Y"] if self.bias else out_BMY

    def _drop(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        if rng is None or self.dropout == 0:
            return x
        keep = jax.random.bernoulli(rng, 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), 0)
