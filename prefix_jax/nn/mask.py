"""Who sees whom: the attention mask as a function of where tokens stand."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Tokens:
    """Where each token stands; the attention mask follows from it alone.

    A token sees keys of its own group whose branch is 0 or its own, at positions up to its own,
    and the whole prefix. So several examples pack into a row (groups), and several targets share
    one source (branch 0 is the source, branches 1, 2, … its targets).

    Attributes:
        group_BT: int32, from 1; 0 marks padding.
        branch_BT: int32.
        position_BT: int32, from 0 at the first token of each example's text.
    """

    group_BT: jax.Array
    branch_BT: jax.Array
    position_BT: jax.Array

    @classmethod
    def plain(cls, present_BT: jax.Array) -> Tokens:
        """One unpacked example a row; `present_BT` is False at padding, on either side."""
        group_BT = present_BT.astype(jnp.int32)
        position_BT = jnp.maximum(jnp.cumsum(group_BT, axis=1) - 1, 0)
        return cls(group_BT, jnp.zeros_like(group_BT), position_BT)


def visible(
    queries: Tokens,
    keys: Tokens,
    window: int | None = None,
    lineage_BTS: jax.Array | None = None,
) -> jax.Array:
    """The mask of causal attention among tokens, bool [B, T, S].

    Args:
        queries: where the queries stand, [B, T].
        keys: where the keys stand, [B, S].
        window: how many positions back a token sees, its own included; None for all.
        lineage_BTS: True where a query descends from a key. Takes the place of branches where
            they fork again and again, as in beam search.
    """
    group_BT1, group_B1S = queries.group_BT[:, :, None], keys.group_BT[:, None, :]
    distance_BTS = queries.position_BT[:, :, None] - keys.position_BT[:, None, :]
    mask_BTS = (group_BT1 == group_B1S) & (group_B1S > 0) & (distance_BTS >= 0)
    if lineage_BTS is None:
        branch_BT1, branch_B1S = queries.branch_BT[:, :, None], keys.branch_BT[:, None, :]
        lineage_BTS = (branch_B1S == 0) | (branch_BT1 == branch_B1S)
    mask_BTS &= lineage_BTS
    if window is not None:
        mask_BTS &= distance_BTS < window
    return mask_BTS


def visible_prefix(position_BT: jax.Array, length: int, window: int | None) -> jax.Array:
    """Which prefix slots a sliding window still reaches, bool [B, T, P].

    Slot p stands at position p, as in PEFT, so a prefix falls out like any past token.

    Args:
        position_BT: positions of the queries, the prefix's offset included.
        length: P.
        window: how many positions back a token sees, its own included; None for all.
    """
    distance_BTP = position_BT[:, :, None] - jnp.arange(length)
    return distance_BTP < (jnp.iinfo(jnp.int32).max if window is None else window)
