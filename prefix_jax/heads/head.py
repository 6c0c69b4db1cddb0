"""The layers on top of a backbone that turn hidden states into answers."""

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

# The standard deviation of what transformers initialises heads with.
_STD = 0.02
# Models whose classification head has a layer of its own, where BERT has its pretrained pooler.
_OWN_LAYER = {
    "roberta": "tanh",
    "xlm-roberta": "tanh",
    "camembert": "tanh",
    "electra": "gelu",
    "distilbert": "relu",
}


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear layer on hidden states, and perhaps one more before it.

    `make_head` gives each model the head that transformers gives it, and that P-tuning v2 (Liu et
    al. 2022) and PEFT's `modules_to_save` train beside the prefix.

    Attributes:
        kind: the task, which decides the loss.
        outputs: Y, the numbers that it makes of a hidden state: a logit for every label; a value;
            a logit for the start and one for the end of a span; a logit for a choice.
        activation: of a layer D → D that comes first; None for no such layer.
        pooled: whether it reads what the backbone's own pretrained pooler, which stays frozen,
            makes of a hidden state (BERT).
        bias: whether the last layer has one.
        dropout: the probability with which an element of the input of the last layer is zeroed in
            training, the others scaled up.
        drop_input: whether dropout falls on the input of the first of two layers as well.
        soft: whether it reads the first of the soft tokens before an encoder, in place of the
            text's first token, as PEFT's classification does.
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
        """The initial parameters, float32: weights from a normal distribution, biases zero."""
        dense_rng, out_rng = jax.random.split(rng)
        params = {"out_DY": _STD * jax.random.normal(out_rng, (d_model, self.outputs))}
        if self.bias:
            params["out_bias_Y"] = jnp.zeros((self.outputs,))
        if self.activation is not None:
            params["dense_DE"] = _STD * jax.random.normal(dense_rng, (d_model, d_model))
            params["dense_bias_E"] = jnp.zeros((d_model,))
        return params

    def __call__(self, params: Params, h_BMD: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """out_BMY in float32, of hidden states (or pooled ones). With `rng`, under dropout."""
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
        """The summed loss of each row's targets, [B].

        Cross-entropy of labels, squared errors of values, and for candidates the cross-entropy of
        choosing the right one: of a span, the mean of its start's and its end's.
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
    """The head of transformers for a task on a model.

    Args:
        kind: the task.
        outputs: labels, for "classify" and "tag"; else it is known.
        model_type: of the backbone's checkpoint.
        causal: whether the backbone is a decoder. Its head reads the last token, without a bias.
        pooler: whether the backbone has a pretrained pooler.
        dropout: of heads that have any.
    """
    if kind == "span":
        return Head(kind, 2)
    if kind == "tag":
        return Head(kind, outputs, dropout=dropout)
    outputs = outputs if kind == "classify" else 1
    if causal:
        return Head(kind, outputs, bias=False)
    own = _OWN_LAYER.get(model_type)
    # RoBERTa's multiple choice does read the pooler, its classification does not.
    if pooler and (own is None or kind == "choice"):
        return Head(kind, outputs, pooled=True, dropout=dropout)
    return Head(kind, outputs, activation=own or "tanh", dropout=dropout, drop_input=own != "relu")
