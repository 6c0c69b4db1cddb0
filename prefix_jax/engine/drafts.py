"""Drafts for speculative decoding: guesses of the next tokens, verified in one forward pass.

A drafted token is the one that most often followed the last tokens in the prefix's training data
(its n-gram table), or that followed them in the row's own text (prompt lookup). Tokens are chosen
as without drafts, and a drafted token counts only if it is the one that was chosen. A draft
therefore changes the speed and never the text.

Leviathan et al. 2023 introduced speculative decoding; prompt lookup is due to Saxena 2023.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from prefix_jax.data.ngrams import ALWAYS, NO_CONTEXT, ORDER, TOKEN_BITS, extend_key, finish_key

# The longest draft.
MAX_TOKENS = 8
# The assumed probability that a drafted token is accepted, before any was verified.
PRIOR = 0.5
# Weight of the previous estimate per verified token.
_DECAY = 0.9
# The time of a forward pass of R rows with T tokens each is proportional to w + R (r + T): w stands
# for reading the weights, and r for the work per row that does not depend on T. Fitted to
# SmolLM2-135M on 2 CPU cores; on accelerators, w is the number of tokens at which products with
# the weights become limited by arithmetic.
_COST = {"cpu": (8.0, 0.5)}
_ACCELERATOR = (200.0, 0.5)
# A row's own text is preferred to an entry of the table that was right less often than this in
# training, if at least two tokens match.
_TRUSTED, _MATCH = 0.5, 2


@flax.struct.dataclass
class Tables:
    """The n-gram tables of all rows, see `NgramTable`.

    Attributes:
        entry_BG2W: the entries, with room for the largest table.
        buckets_B: the number of buckets in each table; 0 without one.
    """

    entry_BG2W: jax.Array
    buckets_B: jax.Array

    @classmethod
    def empty(cls, rows: int, buckets: int, ways: int) -> Tables:
        """Tables without entries."""
        return cls(jnp.zeros((rows, buckets, 2, ways), jnp.uint32), jnp.zeros(rows, jnp.int32))

    def resize(self, buckets: int) -> Tables:
        """Returns tables with room for more buckets."""
        missing = buckets - self.entry_BG2W.shape[1]
        more = [(0, 0), (0, missing), (0, 0), (0, 0)]
        return Tables(jnp.pad(self.entry_BG2W, more), self.buckets_B)

    def start(self, row: jax.Array, entry_G2W: jax.Array | None) -> Tables:
        """Returns tables in which a row has this one, or none."""
        if entry_G2W is None:
            return Tables(self.entry_BG2W, self.buckets_B.at[row].set(0))
        entry_BG2W = jax.lax.dynamic_update_slice(self.entry_BG2W, entry_G2W[None], (row, 0, 0, 0))
        return Tables(entry_BG2W, self.buckets_B.at[row].set(len(entry_G2W)))

    def look_up(self, last_BO: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Looks up the longest context that has an entry.

        Args:
            last_BO: the last `ORDER` tokens of each row, the latest first.
            length_B: the number of tokens of each row.

        Returns:
            The next token of each row, and how often it followed in training, from 0 (no entry) to
            1.
        """
        rows_B = jnp.arange(len(length_B))
        key_B = jnp.full(len(length_B), NO_CONTEXT)
        value_B = jnp.zeros(len(length_B), jnp.uint32)
        for order in range(ORDER):
            key_B = extend_key(key_B, last_BO[:, order].astype(jnp.uint32))
            whole_B = finish_key(key_B)
            bucket_B = (whole_B & (self.buckets_B - 1).astype(jnp.uint32)).astype(jnp.int32)
            entry_B2W = self.entry_BG2W[rows_B, bucket_B]
            same_BW = (entry_B2W[:, 0] == whole_B[:, None]) & (length_B > order)[:, None]
            found_B = jnp.where(same_BW, entry_B2W[:, 1], 0).max(axis=1)
            value_B = jnp.where(same_BW.any(axis=1), found_B, value_B)
        value_B = jnp.where(self.buckets_B > 0, value_B, 0)
        token_B = (value_B & (2**TOKEN_BITS - 1)).astype(jnp.int32)
        return token_B, (value_B >> TOKEN_BITS) / ALWAYS


def relative_cost(platform: str, rows: int, tokens: int) -> float:
    """Estimates the time of a forward pass with a draft, relative to one without.

    Args:
        platform: of the devices: "cpu", "gpu" or "tpu".
        rows: the number of rows.
        tokens: the number of drafted tokens per row.
    """
    weights, row = _COST.get(platform, _ACCELERATOR)
    return (weights + rows * (row + 1 + tokens)) / (weights + rows * (row + 1))


def best_length(platform: str, rows: int) -> int:
    """Returns the length of drafts that decodes fastest if 70 % of the drafted tokens are right."""

    def speed(tokens: int) -> float:
        accepted = sum(0.7**i for i in range(1, tokens + 1))
        return (1 + accepted) / relative_cost(platform, rows, tokens)

    return max(range(1, MAX_TOKENS + 1), key=speed)


def propose(
    tables: Tables | None, ids_BS: jax.Array, length_B: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Drafts the next tokens of every row, one after the other.

    In the row's own text, the longest match of the last tokens counts, drafted ones included, and
    the latest of several.

    Args:
        tables: the n-gram tables of the rows; None if no row has one.
        ids_BS: the tokens of each row, from column 0.
        length_B: their number.
        count: K, the maximum length of a draft.

    Returns:
        draft_BK, and the number of drafted tokens of each row.
    """
    B, S = ids_BS.shape
    column_S = jnp.arange(S)

    def advance(match_BS: jax.Array, ids_BS: jax.Array, token_B: jax.Array) -> jax.Array:
        """Extends matches that end in the column before by a token."""
        before_BS = jnp.pad(match_BS[:, :-1], ((0, 0), (1, 0)))
        longer_BS = jnp.minimum(before_BS + 1, ORDER)
        return jnp.where(ids_BS == token_B[:, None], longer_BS, 0)

    def draft(carry: Any, offset: jax.Array) -> tuple[Any, jax.Array]:
        ids_BS, match_BS, last_BO, offered_B = carry
        end_B1 = (length_B + offset)[:, None]
        # The matching text, and the token after it, precede the end.
        usable_BS = (column_S < end_B1 - 1) & (match_BS > 0)
        score_BS = jnp.where(usable_BS, match_BS * S + column_S, -1)
        best_B1 = score_BS.argmax(axis=1)[:, None]
        found_B = usable_BS.any(axis=1)
        token_B = jnp.take_along_axis(ids_BS, jnp.minimum(best_B1 + 1, S - 1), axis=1)[:, 0]
        if tables is not None:
            from_table_B, share_B = tables.look_up(last_BO, length_B + offset)
            match_B = jnp.take_along_axis(match_BS, best_B1, axis=1)[:, 0]
            better_B = (share_B >= _TRUSTED) | ~found_B | (match_B < _MATCH)
            token_B = jnp.where((share_B > 0) & better_B, from_table_B, token_B)
            found_B |= share_B > 0
        found_B &= offered_B == offset
        ids_BS = jnp.where((column_S == end_B1) & found_B[:, None], token_B[:, None], ids_BS)
        match_BS = advance(match_BS, ids_BS, token_B)
        last_BO = jnp.concatenate([token_B[:, None], last_BO[:, :-1]], axis=1)
        return (ids_BS, match_BS, last_BO, offered_B + found_B), token_B

    column_BO = length_B[:, None] - 1 - jnp.arange(ORDER)
    last_BO = jnp.take_along_axis(ids_BS, jnp.maximum(column_BO, 0), axis=1)
    last_BO = jnp.where(column_BO >= 0, last_BO, -1)
    match_BS = jnp.zeros((B, S), jnp.int32)
    for order in reversed(range(ORDER)):
        match_BS = advance(match_BS, ids_BS, last_BO[:, order])
    start = (ids_BS, match_BS, last_BO, jnp.zeros(B, jnp.int32))
    (_, _, _, offered_B), draft_KB = jax.lax.scan(draft, start, jnp.arange(count))
    return draft_KB.T, offered_B


def expected_tokens(acceptance_B: jax.Array, offered_B: jax.Array) -> jax.Array:
    """The expected number of drafted tokens that are accepted.

    Args:
        acceptance_B: the probability that a drafted token is accepted if those before it are.
        offered_B: the number of drafted tokens.
    """
    return acceptance_B * (1 - acceptance_B**offered_B) / (1 - acceptance_B)


def update_acceptance(
    acceptance_B: jax.Array, right_B: jax.Array, judged_B: jax.Array
) -> jax.Array:
    """Returns new estimates of `acceptance_B`.

    They are moving averages over the verified tokens, bounded so that no row becomes certain.

    Args:
        acceptance_B: the estimates so far.
        right_B: the number of drafted tokens that were accepted.
        judged_B: the number that was verified.
    """
    share_B = right_B / jnp.maximum(judged_B, 1)
    new_B = share_B + (acceptance_B - share_B) * _DECAY**judged_B
    return jnp.clip(new_B, 0.01, 0.99)
