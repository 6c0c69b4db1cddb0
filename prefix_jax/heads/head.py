"""Layers on top of a backbone that map hidden states to answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from prefix_jax.data.batch import Batch
from prefix_jax.nn.activations import activation
from prefix_jax.nn.loss import candidate_losses, squared_errors, token_losses

Params = Mapping[str, Any]
Kind = Literal["classify", "regress", "tag", "span", "choice"]

# The standard deviation of initial head weights in transformers.
_STD = 0.02
# Models whose classification head has its own layer in place of BERT's pretrained pooler.
_OWN_LAYER = {
    "roberta": "tanh",
    "xlm-roberta": "tanh",
    "camembert": "tanh",
    "electra": "gelu",
    "distilbert": "relu",
}


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear layer on hidden states, optionally after a dense layer.

    `make_head` builds the same head as transformers for each model. P-tuning v2 (Liu et al. 2022)
    and PEFT's `modules_to_save` train it together with the prefix.

    Attributes:
        kind: the task, which determines the loss.
        outputs: the number of outputs Y per hidden state: one logit per label; one value; two
            logits for the start and the end of a span; one logit per choice.
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

    kind: Kind
    outputs: int
    activation: str | None = None
    pooled: bool = False
    bias: bool = True
    dropout: float = 0.0
    drop_input: bool = True
    soft: bool = False

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

    def losses(self, out_BMY: jax.Array, batch: Batch) -> jax.Array:
        """Returns the summed loss of each row's targets, [B].

        The loss is cross-entropy for labels, squared error for values, and cross-entropy over the
        candidates for choices and spans; for a span, the mean over start and end.
        """
        if self.kind in ("span", "choice"):
            assert batch.question_BM is not None  # as the examples of these tasks have it
            return candidate_losses(out_BMY, batch.label_BM, batch.weight_BM, batch.question_BM)
        if self.kind == "regress":
            loss_BM = squared_errors(out_BMY[..., 0], batch.label_BM)
        else:
            loss_BM = token_losses(out_BMY, batch.label_BM)
        return jnp.sum(loss_BM * batch.weight_BM, axis=1)


def make_head(
    kind: Kind, outputs: int, *, model_type: str, causal: bool, pooler: bool, dropout: float
) -> Head:
    """Builds the head that transformers uses for a task and a model type.

    Args:
        kind: the task.
        outputs: the number of labels, for "classify" and "tag"; ignored otherwise.
        model_type: the model type of the backbone's checkpoint.
        causal: whether the backbone is a decoder. Its head reads the last token, and has no bias
            for classification, regression and choices.
        pooler: whether the backbone has a pretrained pooler.
        dropout: the dropout rate of heads with dropout.
    """
    if kind == "span":
        return Head(kind, 2)
    if kind == "tag":
        return Head(kind, outputs, dropout=dropout)
    outputs = outputs if kind == "classify" else 1
    if causal:
        return Head(kind, outputs, bias=False)
    own = _OWN_LAYER.get(model_type)
    # RoBERTa's multiple-choice head reads the pooler; its classification head does not.
    if pooler and (own is None or kind == "choice"):
        return Head(kind, outputs, pooled=True, dropout=dropout)
    return Head(kind, outputs, activation=own or "tanh", dropout=dropout, drop_input=own != "relu")
