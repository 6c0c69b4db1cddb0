"""Cross-entropy of listed targets, without ever holding the logits of a whole batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from prefix_jax.mesh import constrain_tokens
from prefix_jax.nn import vocabulary

Unembed = Callable[[Any, jax.Array], jax.Array]


def gather_targets(h_BTD: jax.Array, index_BM: jax.Array) -> jax.Array:
    """The hidden states h_BMD that predict the targets."""
    return jnp.take_along_axis(h_BTD, index_BM[..., None], axis=1)


def token_losses(logits_BMV: jax.Array, label_BM: jax.Array) -> jax.Array:
    """Negative log-likelihood of every target, in nats, [B, M]."""
    picked_BM = jnp.take_along_axis(logits_BMV, label_BM[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BMV, axis=-1) - picked_BM


def squared_errors(value_BM: jax.Array, label_BM: jax.Array) -> jax.Array:
    """The squared error of every target, [B, M]."""
    return jnp.square(value_BM - label_BM)


def candidate_losses(
    logits_BMY: jax.Array, label_BM: jax.Array, weight_BM: jax.Array, question_BM: jax.Array
) -> jax.Array:
    """The summed loss of choosing among each question's candidates, [B], in nats.

    Args:
        logits_BMY: of every candidate, for each of Y answers to its question.
        label_BM: bit y is set where the candidate is the right one for answer y.
        weight_BM: 1 at the first candidate of each question, else 0.
        question_BM: from 1; candidates of equal number stand for one answer. 0 is padding.

    Returns:
        The negative log-likelihood of the right candidates, averaged over the Y answers.
    """
    questions = question_BM.shape[1] + 1

    def row(logits_MY: jax.Array, question_M: jax.Array) -> jax.Array:
        """The log of each question's sum of exponentials, at each of its candidates."""
        top_QY = jax.ops.segment_max(jax.lax.stop_gradient(logits_MY), question_M, questions)
        top_MY = top_QY[question_M]
        sum_QY = jax.ops.segment_sum(jnp.exp(logits_MY - top_MY), question_M, questions)
        return jnp.log(sum_QY[question_M]) + top_MY

    total_BMY = jax.vmap(row)(logits_BMY, question_BM)
    right_BMY = (label_BM[..., None] >> jnp.arange(logits_BMY.shape[-1])) & 1
    loss_BMY = weight_BM[..., None] * total_BMY - right_BMY * logits_BMY
    return loss_BMY.mean(axis=-1).sum(axis=1)


def _chunks(array: jax.Array, size: int) -> jax.Array:
    """[B, M, …] as [M / size, B, size, …], zeros filling the last chunk."""
    B, M = array.shape[:2]
    array = jnp.pad(array, [(0, 0), (0, -M % size)] + [(0, 0)] * (array.ndim - 2))
    return jnp.moveaxis(array.reshape(B, -1, size, *array.shape[2:]), 1, 0)


def _chunk_size(h_BMD: jax.Array) -> int:
    """Columns of a chunk: M in equal parts, so that hardly any padding is computed, of which each
    device has as many."""
    B, M = h_BMD.shape[:2]
    parts = -(-M // max(1, vocabulary.chunk_targets() // B))
    size = -(-M // parts)
    return size + -size % vocabulary.column_parts()


def _parts(h_BMD: jax.Array, label_BM: jax.Array, weight_BM: jax.Array) -> tuple[jax.Array, ...]:
    size = _chunk_size(h_BMD)
    return tuple(_chunks(array, size) for array in (h_BMD, label_BM, weight_BM))


def _chunk_losses(
    unembed: Unembed, params: Any, h_BCD: jax.Array, label_BC: jax.Array, weight_BC: jax.Array
) -> jax.Array:
    """The weighted sum of each row's losses, [B]."""
    h_BCD, label_BC, weight_BC = map(vocabulary.rows, (h_BCD, label_BC, weight_BC))
    return jnp.sum(token_losses(unembed(params, h_BCD), label_BC) * weight_BC, axis=1)


def row_losses(
    unembed: Unembed, params: Any, h_BMD: jax.Array, label_BM: jax.Array, weight_BM: jax.Array
) -> jax.Array:
    """The weighted sum of each row's losses, [B]: for evaluation.

    Args:
        unembed: (params, h_BCD) → float32 logits_BCV.
        params: what `unembed` reads.
        h_BMD: hidden states that predict the targets.
        label_BM: the targets.
        weight_BM: float32 weight of each; 0 for padding.
    """
    parts = _parts(h_BMD, label_BM, weight_BM)
    return jax.lax.map(lambda part: _chunk_losses(unembed, params, *part), parts).sum(axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def frozen_head_loss(
    unembed: Unembed, params: Any, h_BMD: jax.Array, label_BM: jax.Array, weight_BM: jax.Array
) -> jax.Array:
    """The summed loss under a head that does not train: `row_losses`, all rows together.

    The gradient of each chunk's logits is taken back to its hidden states while the chunk is at
    hand, so the backward pass neither keeps logits nor computes them again. `params` gets no
    gradient.
    """
    return row_losses(unembed, params, h_BMD, label_BM, weight_BM).sum()


def _forward(
    unembed: Unembed, params: Any, h_BMD: jax.Array, label_BM: jax.Array, weight_BM: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def chunk(part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        h_BCD, *targets = part
        loss, dh_BCD = jax.value_and_grad(
            lambda h_BCD: _chunk_losses(unembed, params, h_BCD, *targets).sum()
        )(h_BCD)
        return loss, constrain_tokens(dh_BCD)

    loss_C, dh_CBCD = jax.lax.map(chunk, _parts(h_BMD, label_BM, weight_BM))
    dh_BMD = jnp.moveaxis(dh_CBCD, 0, 1).reshape(h_BMD.shape[0], -1, h_BMD.shape[2])
    return loss_C.sum(), dh_BMD[:, : h_BMD.shape[1]]


def _backward(unembed: Unembed, dh_BMD: jax.Array, cotangent: jax.Array) -> tuple[Any, ...]:
    return None, (cotangent * dh_BMD).astype(dh_BMD.dtype), None, None


frozen_head_loss.defvjp(_forward, _backward)


def training_head_loss(
    unembed: Unembed, params: Any, h_BMD: jax.Array, label_BM: jax.Array, weight_BM: jax.Array
) -> jax.Array:
    """As `frozen_head_loss`, for a head that trains: each chunk's logits are computed again in
    the backward pass."""
    chunk = jax.checkpoint(lambda part: _chunk_losses(unembed, params, *part).sum())
    return jax.lax.map(chunk, _parts(h_BMD, label_BM, weight_BM)).sum()
