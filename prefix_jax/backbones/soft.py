"""Soft tokens before the input of an encoder, the only part of a prefix that stays embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import Prefix


def prepend(
    prefix: Prefix | None, x_BSD: jax.Array, layout: TokenLayout
) -> tuple[jax.Array, TokenLayout]:
    """Prepends the soft tokens of a prefix, if it has any, as the first P columns.

    A row with soft tokens may hold only one example, because their hidden states depend on the
    text that follows.

    Args:
        prefix: the prefix. With a bank, each row gets the soft tokens of its prefix.
        x_BSD: token embeddings.
        layout: their layout.
    """
    if prefix is None or prefix.embeds_PD is None:
        return x_BSD, layout
    soft_BPD = _soft_tokens(prefix.embeds_PD.astype(x_BSD.dtype), prefix.bank_size, layout)
    return jnp.concatenate([soft_BPD, x_BSD], axis=1), _shift(layout, prefix.soft_tokens)


def _soft_tokens(soft_PD: jax.Array, bank_size: int | None, layout: TokenLayout) -> jax.Array:
    """The soft tokens of each row, [B, P, D]."""
    if bank_size is None:
        return jnp.broadcast_to(soft_PD, (len(layout.segment_BT), *soft_PD.shape))
    # The maximum is the example's index: padding has index 0.
    return soft_PD.reshape(bank_size, -1, soft_PD.shape[1])[layout.require_bank_index().max(axis=1)]


def _shift(layout: TokenLayout, slots: int) -> TokenLayout:
    """The layout with soft tokens in the first columns and the text after them."""
    B = layout.segment_BT.shape[0]
    ones_BP = jnp.ones((B, slots), jnp.int32)

    def join(soft_BP: jax.Array, text_BT: jax.Array) -> jax.Array:
        return jnp.concatenate([soft_BP, text_BT], axis=1)

    branch_BT, token_type_BT = layout.branch_BT, layout.token_type_BT
    return TokenLayout(
        segment_BT=join(ones_BP, layout.segment_BT),
        branch_BT=None if branch_BT is None else join(0 * ones_BP, branch_BT),
        position_BT=join(jnp.arange(slots) * ones_BP, layout.position_BT + slots),
        token_type_BT=None if token_type_BT is None else join(0 * ones_BP, token_type_BT),
    )
