"""Masks, biases and rotary angles of a stack's self-attention, with its prefix."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.stacking import Params
from prefix_jax.nn.attention.mask import (
    AttentionMask,
    MaskAndBias,
    TokenLayout,
    causal_mask,
    prefix_mask,
)
from prefix_jax.nn.layers import AttentionInputs
from prefix_jax.prefix import Prefix, StackName


def attention_inputs(
    arch: Architecture,
    params: Params,
    queries: TokenLayout,
    keys: TokenLayout,
    prefix: Prefix | None,
    *,
    sliding: bool,
    mixed: bool = False,
    column: jax.Array | None = None,
    lineage_BTS: jax.Array | None = None,
    in_zigzag: bool = False,
) -> AttentionInputs:
    """The inputs of self-attention that all layers of one kind share.

    Args:
        arch: the architecture of the stack.
        params: its weights, for the table of relative positions.
        queries, keys: the layouts of both.
        prefix: its site at this stack adds slots; None adds none.
        sliding: the kind of the layers: whether they have a sliding window.
        mixed: whether a scan selects the kind in each layer, so that the inputs of both kinds must
            have the same structure.
        column: the first cache column to write; None without a cache.
        lineage_BTS: True where a query descends from a key, in place of branches.
        in_zigzag: whether the columns are in zigzag order.

    Raises:
        PrefixError: the prefix is a bank, and the layout of the queries has no `bank_index_BT`.
    """
    stack: StackName = "decoder" if arch.causal else "encoder"
    site = None if prefix is None else getattr(prefix, stack)
    slots = 0 if site is None else site.length
    text_position = 0 if prefix is None else prefix.text_position_in(stack)
    position_BT = queries.position_BT + text_position
    window = arch.window if sliding else None

    mask: AttentionMask | jax.Array
    if lineage_BTS is not None:
        mask = causal_mask(queries, keys, window, lineage_BTS)
    elif mixed:
        narrow = jnp.asarray(sliding)
        mask = AttentionMask(queries, keys, arch.causal, arch.window, narrow, zigzag=in_zigzag)
    else:
        mask = AttentionMask(queries, keys, arch.causal, window, zigzag=in_zigzag)

    mask_BTP = bias_BNTS = bias_BNTP = None
    slot_P = jnp.arange(0)
    if prefix is not None and slots:
        slots_per_prefix = slots // (prefix.bank_size or 1)
        slot_P = jnp.arange(slots) % slots_per_prefix
        if arch.window is not None and not prefix.pinned:
            mask_BTP = prefix_mask(position_BT, slot_P, window)
        if prefix.bank_size is not None:
            bank_index_P = jnp.arange(slots) // slots_per_prefix
            same_prefix_BTP = queries.require_bank_index()[:, :, None] == bank_index_P
            mask_BTP = same_prefix_BTP if mask_BTP is None else same_prefix_BTP & mask_BTP
    if arch.relative is not None:
        table_RN = params["relative_RN"]
        key_position_BS = keys.position_BT + text_position
        bias_BNTS = arch.relative.bias(table_RN, position_BT, key_position_BS)
        if slots:
            bias_BNTP = arch.relative.bias(table_RN, position_BT, slot_P[None])

    masking = MaskAndBias(mask, mask_BTP, bias_BNTS, bias_BNTP)
    return AttentionInputs(masking, rotary_angles(arch, position_BT, sliding), column)


def rotary_angles(
    arch: Architecture, position_BT: jax.Array, sliding: bool
) -> tuple[jax.Array, jax.Array] | None:
    """cos_BTH and sin_BTH in layers of one kind; None without rotary embeddings."""
    rotary = arch.sliding_rotary if sliding and arch.sliding_rotary else arch.rotary
    return None if rotary is None else rotary.angles(position_BT, arch.head_dim)
