"""Attention masks, derived from the layout of tokens in a row.

There are three kinds of attention: causal self-attention in a decoder, bidirectional self-attention
in an encoder, and cross-attention from a decoder to its encoder.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from prefix_jax.errors import PrefixError


@flax.struct.dataclass
class TokenLayout:
    """The segment, branch and position of each token, from which masks are derived.

    In a decoder, a token sees the whole prefix, and the keys of its own segment up to its own
    position whose branch is 0 or its own. Segments let several examples be packed into a row;
    branches let several targets share one source (branch 0 is the source, branches 1, 2, … are its
    targets). In an encoder and in cross-attention, a token sees its whole segment.

    Within a row, the positions of each segment and branch increase by one, and a source precedes
    its targets: kernels compare columns where the mask compares positions.

    Attributes:
        segment_BT: int32, the packed example, from 1; 0 marks padding.
        branch_BT: int32; None without branches, which halves a kernel's work.
        position_BT: int32, from 0 at the first token of each example's text.
        token_type_BT: int32, the token type for encoders that embed it (BERT): the first or second
            text of an example. None otherwise.
        bank_index_BT: int32, the index in a bank of the prefix that the token sees; 0 at padding.
            None without a bank.
    """

    segment_BT: jax.Array
    branch_BT: jax.Array | None
    position_BT: jax.Array
    token_type_BT: jax.Array | None = None
    bank_index_BT: jax.Array | None = None

    @classmethod
    def plain(cls, present_BT: jax.Array) -> TokenLayout:
        """One unpacked example per row; `present_BT` is False at padding, on either side."""
        segment_BT = present_BT.astype(jnp.int32)
        position_BT = jnp.maximum(jnp.cumsum(segment_BT, axis=1) - 1, 0)
        return cls(segment_BT, None, position_BT)

    def write(self, new: TokenLayout, column: jax.Array) -> TokenLayout:
        """Returns a copy with `new` written at `column`. Requires `self.branch_BT`."""
        branch_BT = new.branch_BT
        if branch_BT is None:
            branch_BT = jnp.zeros_like(new.segment_BT)
        return jax.tree.map(
            lambda old_BS, new_BT: jax.lax.dynamic_update_slice(old_BS, new_BT, (0, column)),
            self,
            dataclasses.replace(new, branch_BT=branch_BT),
        )

    def require_bank_index(self) -> jax.Array:
        """Returns `bank_index_BT`, which a bank of prefixes needs.

        Raises:
            PrefixError: it is None.
        """
        if self.bank_index_BT is None:
            raise PrefixError(
                "the prefix is a bank, but the tokens have no index into it; pass "
                "TokenLayout.bank_index_BT, or one prefix of the bank (split_bank)"
            )
        return self.bank_index_BT


@flax.struct.dataclass
class AttentionMask:
    """Symbolic attention mask between tokens, which each implementation of attention converts to
    the form that it needs.

    Attributes:
        queries: layout of the queries, [B, T].
        keys: layout of the keys, [B, S].
        causal: whether queries see no later keys; otherwise they see their whole segment.
        window: sliding-window size in positions, including the query's own; None for unlimited.
        narrow: bool scalar, whether the window applies, if the layers of a scan differ; None if it
            applies in all of them.
        zigzag: whether the columns are in zigzag order; see `zigzag`.
    """

    queries: TokenLayout
    keys: TokenLayout
    causal: bool = flax.struct.field(pytree_node=False, default=True)
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    narrow: jax.Array | None = None
    zigzag: bool = flax.struct.field(pytree_node=False, default=False)

    def materialize(self) -> jax.Array:
        """Materialises the mask, bool [B, T, S]."""
        if not self.causal:
            return segment_mask(self.queries, self.keys)
        if self.window is None or self.narrow is None:
            return causal_mask(self.queries, self.keys, self.window)
        everything = jnp.iinfo(jnp.int32).max
        window = jnp.where(self.narrow, self.window, everything)
        return causal_mask(self.queries, self.keys, window)


@flax.struct.dataclass
class MaskAndBias:
    """Mask and bias of one attention.

    Attributes:
        mask: the mask over keys, symbolic or as mask_BTS (True where a query sees a key); None
            if every query sees every key.
        mask_BTP: True where a query sees a prefix slot; None if every query sees every slot.
        bias_BNTS: added to the key logits (T5's relative positions), or None.
        bias_BNTP: added to the prefix logits, or None.
    """

    mask: AttentionMask | jax.Array | None
    mask_BTP: jax.Array | None = None
    bias_BNTS: jax.Array | None = None
    bias_BNTP: jax.Array | None = None

    @property
    def mask_BTS(self) -> jax.Array | None:
        """True where a query sees a key; None if every query sees every key."""
        return self.mask.materialize() if isinstance(self.mask, AttentionMask) else self.mask


def causal_mask(
    queries: TokenLayout,
    keys: TokenLayout,
    window: int | jax.Array | None = None,
    lineage_BTS: jax.Array | None = None,
) -> jax.Array:
    """Causal mask, bool [B, T, S].

    Args:
        queries: layout of the queries, [B, T].
        keys: layout of the keys, [B, S].
        window: sliding-window size in positions, including the query's own; None for unlimited.
        lineage_BTS: True where a query descends from a key. Replaces branches if they fork
            repeatedly, as in beam search.
    """
    segment_BT1, segment_B1S = queries.segment_BT[:, :, None], keys.segment_BT[:, None, :]
    distance_BTS = queries.position_BT[:, :, None] - keys.position_BT[:, None, :]
    mask_BTS = (segment_BT1 == segment_B1S) & (segment_B1S > 0) & (distance_BTS >= 0)
    if lineage_BTS is None and keys.branch_BT is not None:
        branch_B1S = keys.branch_BT[:, None, :]
        lineage_BTS = branch_B1S == 0
        if queries.branch_BT is not None:
            lineage_BTS |= queries.branch_BT[:, :, None] == branch_B1S
    if lineage_BTS is not None:
        mask_BTS &= lineage_BTS
    if window is not None:
        mask_BTS &= distance_BTS < window
    return mask_BTS


def prefix_mask(position_BT: jax.Array, slot_P: jax.Array, window: int | None) -> jax.Array:
    """Mask of the prefix slots that a sliding window still covers, bool [B, T, P].

    Slots precede the text, as in PEFT, so a prefix leaves the window like any past token.

    Args:
        position_BT: positions of the queries, counted with the prefix.
        slot_P: positions of the slots.
        window: sliding-window size in positions, including the query's own; None for unlimited.
    """
    distance_BTP = position_BT[:, :, None] - slot_P
    return distance_BTP < (jnp.iinfo(jnp.int32).max if window is None else window)


def segment_mask(queries: TokenLayout, keys: TokenLayout) -> jax.Array:
    """Mask of encoder self-attention and of cross-attention, bool [B, T, S]."""
    segment_BT1, segment_B1S = queries.segment_BT[:, :, None], keys.segment_BT[:, None, :]
    return (segment_BT1 == segment_B1S) & (segment_B1S > 0)
