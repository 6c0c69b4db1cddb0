"""Who sees whom: the attention mask as a function of where tokens stand.

Three kinds of attention: causal among the tokens of a decoder, bidirectional among those of an
encoder, and across, from a decoder to all that its encoder read.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Tokens:
    """Where each token stands; the attention mask follows from it alone.

    In a decoder a token sees keys of its own group whose branch is 0 or its own, at positions up
    to its own, and the whole prefix. So several examples pack into a row (groups), and several
    targets share one source (branch 0 is the source, branches 1, 2, … its targets). In an
    encoder, and from a decoder to its encoder, a token sees the whole of its group.

    Along a row, positions of a group and branch ascend one by one, and a source stands before its
    targets: kernels compare columns where the mask compares positions.

    Attributes:
        group_BT: int32, from 1; 0 marks padding.
        branch_BT: int32; None where nothing branches, which spares a kernel half of its work.
        position_BT: int32, from 0 at the first token of each example's text.
        segment_BT: int32, which of two texts of an example a token belongs to, for encoders that
            embed it (BERT); None where nothing asks.
        task_BT: int32, whose prefix of a bank each token sees; 0 at padding. None where there is
            no bank.
    """

    group_BT: jax.Array
    branch_BT: jax.Array | None
    position_BT: jax.Array
    segment_BT: jax.Array | None = None
    task_BT: jax.Array | None = None

    @classmethod
    def plain(cls, present_BT: jax.Array) -> Tokens:
        """One unpacked example a row; `present_BT` is False at padding, on either side."""
        group_BT = present_BT.astype(jnp.int32)
        position_BT = jnp.maximum(jnp.cumsum(group_BT, axis=1) - 1, 0)
        return cls(group_BT, None, position_BT)

    def write(self, new: Tokens, column: jax.Array) -> Tokens:
        """The same with the columns from `column` on replaced. These tokens have branches."""
        branch_BT = new.branch_BT
        if branch_BT is None:
            branch_BT = jnp.zeros_like(new.group_BT)
        return jax.tree.map(
            lambda old_BS, new_BT: jax.lax.dynamic_update_slice(old_BS, new_BT, (0, column)),
            self,
            dataclasses.replace(new, branch_BT=branch_BT),
        )


@flax.struct.dataclass
class Sight:
    """Who sees whom among tokens: the mask as a rule, of which each implementation of attention
    makes what it needs.

    Attributes:
        queries: where the queries stand, [B, T].
        keys: where the keys stand, [B, S].
        causal: whether a query sees no later key; otherwise it sees its whole group.
        window: how many positions back a query sees, its own included; None for all.
        narrow: bool scalar, whether the window holds, where layers of one scan differ in it; None
            where it holds in all.
        dealt: whether queries and keys are the columns of rows that `columns.deal` dealt out.
    """

    queries: Tokens
    keys: Tokens
    causal: bool = flax.struct.field(pytree_node=False, default=True)
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    narrow: jax.Array | None = None
    dealt: bool = flax.struct.field(pytree_node=False, default=False)

    def mask(self) -> jax.Array:
        """The same as an array, bool [B, T, S]."""
        if not self.causal:
            return visible_group(self.queries, self.keys)
        if self.window is None or self.narrow is None:
            return visible(self.queries, self.keys, self.window)
        everything = jnp.iinfo(jnp.int32).max
        window = jnp.where(self.narrow, self.window, everything)
        return visible(self.queries, self.keys, window)


@flax.struct.dataclass
class Seen:
    """What queries see, and how they weigh where it stands.

    Attributes:
        tokens: which keys a query sees: a rule, or mask_BTS, True where it does; None if all see
            all.
        mask_BTP: True where a query sees a prefix slot; None if all see all.
        bias_BNTS: added to the logits of the keys (T5's relative positions); None adds nothing.
        bias_BNTP: added to the logits of the prefix slots.
    """

    tokens: Sight | jax.Array | None
    mask_BTP: jax.Array | None = None
    bias_BNTS: jax.Array | None = None
    bias_BNTP: jax.Array | None = None

    @property
    def mask_BTS(self) -> jax.Array | None:
        """True where a query sees a key; None if all see all."""
        return self.tokens.mask() if isinstance(self.tokens, Sight) else self.tokens


def visible(
    queries: Tokens,
    keys: Tokens,
    window: int | jax.Array | None = None,
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


def visible_prefix(position_BT: jax.Array, slot_P: jax.Array, window: int | None) -> jax.Array:
    """Which prefix slots a sliding window still reaches, bool [B, T, P].

    Slots stand before the text, as in PEFT, so a prefix falls out like any past token.

    Args:
        position_BT: positions of the queries, the prefix's offset included.
        slot_P: positions of the slots.
        window: how many positions back a token sees, its own included; None for all.
    """
    distance_BTP = position_BT[:, :, None] - slot_P
    return distance_BTP < (jnp.iinfo(jnp.int32).max if window is None else window)


def visible_group(queries: Tokens, keys: Tokens) -> jax.Array:
    """The mask of an encoder's attention, and of a decoder's to its encoder, bool [B, T, S]."""
    group_BT1, group_B1S = queries.group_BT[:, :, None], keys.group_BT[:, None, :]
    return (group_BT1 == group_B1S) & (group_B1S > 0)
