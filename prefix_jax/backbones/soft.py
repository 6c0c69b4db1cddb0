"""Soft tokens before an encoder: of all that methods make, they alone stay embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefix_jax.backbones.stack import task_of
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import Prefix


def prepend(
    prefix: Prefix | None, x_BSD: jax.Array, tokens: TokenLayout
) -> tuple[jax.Array, TokenLayout]:
    """What an encoder reads, with a prefix's soft tokens in the first P columns if it has any.

    A row that gets some holds one example: what soft tokens become depends on the text behind them.

    Args:
        prefix: of a bank, each row gets the soft tokens of its task.
        x_BSD: token embeddings.
        tokens: where they stand.
    """
    if prefix is None or prefix.embeds_PD is None:
        return x_BSD, tokens
    soft_BPD = _of_rows(prefix.embeds_PD.astype(x_BSD.dtype), prefix.tasks, tokens)
    return jnp.concatenate([soft_BPD, x_BSD], axis=1), _behind(tokens, prefix.soft_tokens)


def _of_rows(soft_PD: jax.Array, tasks: int | None, tokens: TokenLayout) -> jax.Array:
    """The soft tokens of each row, [B, P, D]."""
    if tasks is None:
        return jnp.broadcast_to(soft_PD, (len(tokens.segment_BT), *soft_PD.shape))
    # Padding on either side of the example has task 0.
    return soft_PD.reshape(tasks, -1, soft_PD.shape[1])[task_of(tokens).max(axis=1)]


def _behind(tokens: TokenLayout, slots: int) -> TokenLayout:
    """Where all stand: the soft ones in the first columns, and the tokens behind them."""
    B = tokens.segment_BT.shape[0]
    ones_BP = jnp.ones((B, slots), jnp.int32)

    def joined(first_BP: jax.Array, rest_BT: jax.Array) -> jax.Array:
        return jnp.concatenate([first_BP, rest_BT], axis=1)

    branch_BT, token_type_BT = tokens.branch_BT, tokens.token_type_BT
    return TokenLayout(
        segment_BT=joined(ones_BP, tokens.segment_BT),
        branch_BT=None if branch_BT is None else joined(0 * ones_BP, branch_BT),
        position_BT=joined(jnp.arange(slots) * ones_BP, tokens.position_BT + slots),
        token_type_BT=None if token_type_BT is None else joined(0 * ones_BP, token_type_BT),
    )
