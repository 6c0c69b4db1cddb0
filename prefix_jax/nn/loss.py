"""Cross-entropy at target positions, computed in chunks to avoid the logits of a whole batch."""

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
    """Gathers the hidden states that predict the targets, h_BMD."""
    return jnp.take_along_axis(h_BTD, index_BM[..., None], axis=1)


def token_losses(logits_BMV: jax.Array, label_BM: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target, in nats, [B, M]."""
    picked_BM = jnp.take_along_axis(logits_BMV, label_BM[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BMV, axis=-1) - picked_BM


def squared_errors(value_BM: jax.Array, label_BM: jax.Array) -> jax.Array:
    """Squared error of each target, [B, M]."""
    return jnp.square(value_BM - label_BM)


def candidate_losses(
    logits_BMY: jax.Array, label_BM: jax.Array, weight_BM: jax.Array, question_BM: jax.Array
) -> jax.Array:
    """Summed loss of choosing among each question's candidates, [B], in nats.

    Args:
        logits_BMY: logits of every candidate, for each of the Y answers to its question.
        label_BM: a bit mask; bit y is set if the candidate is correct for answer y.
        weight_BM: 1 at the first candidate of each question, else 0.
        question_BM: question number from 1, shared by a question's candidates; 0 is padding.

    Returns:
        The negative log-likelihood of the correct candidates, averaged over the Y answers.
    """
    total_BMY = _logsumexp_per_question(logits_BMY, question_BM)
    right_BMY = (label_BM[..., None] >> jnp.arange(logits_BMY.shape[-1])) & 1
    loss_BMY = weight_BM[..., None] * total_BMY - right_BMY * logits_BMY
    return loss_BMY.mean(axis=-1).sum(axis=1)


def listwise_losses(
    score_BM: jax.Array, relevance_BM: jax.Array, question_BM: jax.Array
) -> jax.Array:
    """Summed softmax cross-entropy of ranking each question's candidates, [B], in nats.

    Args:
        score_BM: the score of every candidate.
        relevance_BM: its relevance, from 0; at least one per question is positive.
        question_BM: question number from 1, shared by a question's candidates; 0 is padding.
    """
    total_BM = _logsumexp_per_question(score_BM[..., None], question_BM)[..., 0]

    def shares(relevance_M: jax.Array, question_M: jax.Array) -> jax.Array:
        """Each candidate's share of the relevance of its question."""
        sum_Q = jax.ops.segment_sum(relevance_M, question_M, len(question_M) + 1)
        return relevance_M / jnp.maximum(sum_Q[question_M], jnp.finfo(jnp.float32).tiny)

    share_BM = jax.vmap(shares)(jnp.where(question_BM > 0, relevance_BM, 0), question_BM)
    return jnp.sum(share_BM * (total_BM - score_BM), axis=1)


def _logsumexp_per_question(logits_BMY: jax.Array, question_BM: jax.Array) -> jax.Array:
    """Log-sum-exp over each question's candidates, repeated for each candidate, [B, M, Y]."""
    questions = question_BM.shape[1] + 1

    def row(logits_MY: jax.Array, question_M: jax.Array) -> jax.Array:
        top_QY = jax.ops.segment_max(jax.lax.stop_gradient(logits_MY), question_M, questions)
        top_MY = top_QY[question_M]
        sum_QY = jax.ops.segment_sum(jnp.exp(logits_MY - top_MY), question_M, questions)
        return jnp.log(sum_QY[question_M]) + top_MY

    return jax.vmap(row)(logits_BMY, question_BM)


def _chunks(array: jax.Array, size: int) -> jax.Array:
    """Reshapes [B, M, …] to [M / size, B, size, …], zero-padding the last chunk."""
    B, M = array.shape[:2]
    array = jnp.pad(array, [(0, 0), (0, -M % size)] + [(0, 0)] * (array.ndim - 2))
    return jnp.moveaxis(array.reshape(B, -1, size, *array.shape[2:]), 1, 0)


def _chunk_size(h_BMD: jax.Array) -> int:
    """Columns per chunk: M in equal parts, so that there is little padding, and divisible by the
    number of devices that share the columns."""
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
    """Weighted sum of each row's losses, [B]."""
    h_BCD, label_BC, weight_BC = map(vocabulary.rows, (h_BCD, label_BC, weight_BC))
    return jnp.sum(token_losses(unembed(params, h_BCD), label_BC) * weight_BC, axis=1)


def row_losses(
    unembed: Unembed, params: Any, h_BMD: jax.Array, label_BM: jax.Array, weight_BM: jax.Array
) -> jax.Array:
    """Weighted sum of each row's losses, [B], for evaluation.

    Args:
        unembed: (params, h_BCD) → float32 logits_BCV.
        params: the parameters of `unembed`.
        h_BMD: hidden states that predict the targets.
        label_BM: the targets.
        weight_BM: float32 weight of each target; 0 for padding.
    """
    parts = _parts(h_BMD, label_BM, weight_BM)
    return jax.lax.map(lambda part: _chunk_losses(unembed, params, *part), parts).sum(axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def frozen_head_loss(
    unembed: Unembed, params: Any, h_BMD: jax.Array, label_BM: jax.Array, weight_BM: jax.Array
) -> jax.Array:
    """Summed loss with a frozen head: the sum of `row_losses`.

    The forward pass computes the gradient of each chunk's hidden states while its logits are in
    memory, so the backward pass neither stores nor recomputes logits. `params` has no gradient.
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
    """Like `frozen_head_loss`, for a trainable head: the backward pass recomputes each chunk's
    logits."""
    chunk = jax.checkpoint(lambda part: _chunk_losses(unembed, params, *part).sum())
    return jax.lax.map(chunk, _parts(h_BMD, label_BM, weight_BM)).sum()
