"""Logits processors: they change the scores of the next token before one is chosen.

Each function maps scores [R, V] to scores [R, V] and matches its counterpart in transformers;
`constrain` and `warp` apply them in the same order as transformers. A processor that is off is None
and is never traced.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from prefix_jax.decode.topk import top_k

NEVER = -jnp.inf


@flax.struct.dataclass
class Constraints:
    """Limits on the next token, given the tokens so far.

    Numbers are arrays, so that changing their values does not recompile.

    Attributes:
        eos_E: the tokens that end a text.
        min_new: the number of new tokens before an end token is allowed.
        repetition_penalty: divides (if positive) or multiplies (if negative) the scores of tokens
            that have already occurred, including in the prompt.
        banned: token sequences that must not be completed, one array [words, length] per length.
        no_repeat_ngram_size: size of n-grams that must not occur twice, including in the prompt.
        first: the token that must come first; None for any.
        last: the token that must come at the length limit; None for any.
    """

    eos_E: jax.Array
    min_new: jax.Array | None = None
    repetition_penalty: jax.Array | None = None
    banned: tuple[jax.Array, ...] = ()
    no_repeat_ngram_size: int | None = flax.struct.field(pytree_node=False, default=None)
    first: jax.Array | None = None
    last: jax.Array | None = None


@flax.struct.dataclass
class Sampling:
    """The distribution that tokens are sampled from.

    Attributes:
        temperature: divides the scores.
        top_p: keeps the smallest set of likeliest tokens with at least this total probability.
        min_p: drops tokens less likely than this fraction of the likeliest token's probability.
        top_k: keeps this many of the likeliest tokens.
    """

    temperature: jax.Array
    top_p: jax.Array | None = None
    min_p: jax.Array | None = None
    top_k: int | None = flax.struct.field(pytree_node=False, default=None)


def constrain(
    scores_RV: jax.Array,
    ids_RW: jax.Array,
    length_R: jax.Array,
    step: jax.Array,
    end: jax.Array,
    constraints: Constraints,
) -> jax.Array:
    """Applies every constraint.

    Args:
        scores_RV: logits or log-probabilities.
        ids_RW: the prompt and generated tokens of each row, from column 0.
        length_R: the number of tokens in each row.
        step: the number of generated tokens.
        end: the maximum number of generated tokens.
        constraints: what to apply.
    """
    c = constraints
    if c.repetition_penalty is not None:
        scores_RV = penalise_repetition(scores_RV, ids_RW, length_R, c.repetition_penalty)
    if c.no_repeat_ngram_size is not None:
        scores_RV = forbid_ngrams(scores_RV, ids_RW, length_R, c.no_repeat_ngram_size)
    for banned_XY in c.banned:
        scores_RV = forbid_words(scores_RV, ids_RW, length_R, banned_XY)
    if c.min_new is not None:
        early_RV = scores_RV.at[:, c.eos_E].set(NEVER)
        scores_RV = jnp.where(step < c.min_new, early_RV, scores_RV)
    for token, here in ((c.first, step == 0), (c.last, step == end - 1)):
        if token is not None:
            scores_RV = jnp.where(here, force(scores_RV, token), scores_RV)
    return scores_RV


def warp(logits_RV: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the logits of the distribution that tokens are sampled from."""
    logits_RV = logits_RV / sampling.temperature
    if sampling.top_k is not None:
        logits_RV = keep_top_k(logits_RV, sampling.top_k)
    if sampling.top_p is not None:
        logits_RV = keep_top_p(logits_RV, sampling.top_p)
    if sampling.min_p is not None:
        logits_RV = keep_min_p(logits_RV, sampling.min_p)
    return logits_RV


def penalise_repetition(
    scores_RV: jax.Array, ids_RW: jax.Array, length_R: jax.Array, penalty: jax.Array
) -> jax.Array:
    """Lowers the scores of tokens that have already occurred (Keskar et al. 2019)."""
    score_RW = jnp.take_along_axis(scores_RV, ids_RW, axis=1)
    score_RW = jnp.where(score_RW < 0, score_RW * penalty, score_RW / penalty)
    present_RW = jnp.arange(ids_RW.shape[1]) < length_R[:, None]
    return _set(scores_RV, ids_RW, present_RW, score_RW)


def forbid_ngrams(
    scores_RV: jax.Array, ids_RW: jax.Array, length_R: jax.Array, n: int
) -> jax.Array:
    """Forbids every token that would repeat an n-gram."""
    if n > ids_RW.shape[1]:
        return scores_RV
    windows = ids_RW.shape[1] - n + 1
    suffix_RN = _last(ids_RW, length_R, n - 1)
    match_RW = jnp.arange(windows) + n <= length_R[:, None]
    for i in range(n - 1):
        match_RW &= ids_RW[:, i : i + windows] == suffix_RN[:, i, None]
    return _set(scores_RV, ids_RW[:, n - 1 :], match_RW, NEVER)


def forbid_words(
    scores_RV: jax.Array, ids_RW: jax.Array, length_R: jax.Array, banned_XY: jax.Array
) -> jax.Array:
    """Forbids the last token of each banned sequence if its other tokens have just occurred."""
    before = banned_XY.shape[1] - 1
    suffix_RY = _last(ids_RW, length_R, before)
    match_RX = (suffix_RY[:, None] == banned_XY[:, :-1]).all(axis=-1)
    match_RX &= length_R[:, None] >= before
    last_RX = jnp.broadcast_to(banned_XY[:, -1], match_RX.shape)
    return _set(scores_RV, last_RX, match_RX, NEVER)


def forbid_ngrams_of_rows(
    scores_RV: jax.Array, ids_RW: jax.Array, length_R: jax.Array, n_R: jax.Array
) -> jax.Array:
    """Like `forbid_ngrams`, with a size per row; 0 forbids nothing."""
    W = ids_RW.shape[1]
    column_W = jnp.arange(W)

    def compare(d: jax.Array, match_RW: jax.Array) -> jax.Array:
        """Keeps columns whose d-th token before them equals the d-th last token of the row."""
        last_R = jnp.take_along_axis(ids_RW, jnp.maximum(length_R - d, 0)[:, None], axis=1)
        same_RW = ids_RW[:, jnp.maximum(column_W - d, 0)] == last_R
        return match_RW & (same_RW | (d >= n_R)[:, None])

    match_RW = (column_W >= n_R[:, None] - 1) & (column_W < length_R[:, None])
    match_RW &= (n_R > 0)[:, None]
    match_RW = jax.lax.fori_loop(1, n_R.max(), compare, match_RW)
    return _set(scores_RV, ids_RW, match_RW, NEVER)


def forbid_words_of_rows(
    scores_RV: jax.Array, ids_RW: jax.Array, length_R: jax.Array, banned_RXY: jax.Array
) -> jax.Array:
    """Like `forbid_words`, with sequences per row, padded with -1 on the left."""
    suffix_RY = _last(ids_RW, length_R, banned_RXY.shape[2] - 1)
    before_RXY, last_RX = banned_RXY[:, :, :-1], banned_RXY[:, :, -1]
    match_RX = ((suffix_RY[:, None] == before_RXY) | (before_RXY < 0)).all(axis=-1)
    match_RX &= length_R[:, None] >= (before_RXY >= 0).sum(axis=-1)
    return _set(scores_RV, last_RX, match_RX & (last_RX >= 0), NEVER)


def forbid(scores_RV: jax.Array, ids_RX: jax.Array, where_RX: jax.Array) -> jax.Array:
    """Forbids the tokens `ids_RX` of each row where `where_RX` is True."""
    return _set(scores_RV, ids_RX, where_RX, NEVER)


def keep_top_k(logits_RV: jax.Array, k: int) -> jax.Array:
    """Keeps the k likeliest tokens, and any that tie with the k-th."""
    least_R = top_k(logits_RV, min(k, logits_RV.shape[1]))[0][:, -1]
    return jnp.where(logits_RV < least_R[:, None], NEVER, logits_RV)


def keep_top_k_of_rows(logits_RV: jax.Array, k_R: jax.Array) -> jax.Array:
    """Like `keep_top_k`, with a number of tokens per row."""
    V = logits_RV.shape[1]
    ascending_RV = jnp.sort(logits_RV, axis=1)
    least_R1 = jnp.take_along_axis(ascending_RV, V - jnp.minimum(k_R, V)[:, None], axis=1)
    return jnp.where(logits_RV < least_R1, NEVER, logits_RV)


def keep_top_p(logits_RV: jax.Array, top_p: jax.Array) -> jax.Array:
    """Applies nucleus sampling (Holtzman et al. 2020).

    Drops the least likely tokens whose total probability is at most 1 - top_p, but never the
    likeliest token.
    """
    ascending_RV = jnp.sort(logits_RV, axis=1)
    drop_RV = jnp.cumsum(jax.nn.softmax(ascending_RV, axis=1), axis=1) <= 1 - top_p
    first_R = jnp.minimum(drop_RV.sum(axis=1), logits_RV.shape[1] - 1)
    least_R1 = jnp.take_along_axis(ascending_RV, first_R[:, None], axis=1)
    return jnp.where(logits_RV < least_R1, NEVER, logits_RV)


def keep_min_p(logits_RV: jax.Array, min_p: jax.Array) -> jax.Array:
    """Drops tokens less likely than `min_p` times the likeliest token's probability."""
    least_R1 = logits_RV.max(axis=1, keepdims=True) + jnp.log(min_p)
    return jnp.where(logits_RV < least_R1, NEVER, logits_RV)


def force(scores_RV: jax.Array, token: jax.Array) -> jax.Array:
    """Returns scores that give one token probability 1."""
    return jnp.full_like(scores_RV, NEVER).at[:, token].set(0)


def _last(ids_RW: jax.Array, length_R: jax.Array, count: int) -> jax.Array:
    """Returns the last `count` tokens of each row; meaningless for shorter rows."""
    column_RC = jnp.maximum(length_R[:, None] - count + jnp.arange(count), 0)
    return jnp.take_along_axis(ids_RW, column_RC, axis=1)


def _set(
    scores_RV: jax.Array, ids_RX: jax.Array, where_RX: jax.Array, values: jax.Array | float
) -> jax.Array:
    """Replaces the scores of the tokens in `ids_RX` where `where_RX` is True."""
    rows_R1 = jnp.arange(scores_RV.shape[0])[:, None]
    nowhere = scores_RV.shape[1]
    return scores_RV.at[rows_R1, jnp.where(where_RX, ids_RX, nowhere)].set(values, mode="drop")
