"""Attention over a prefix and tokens.

Prefix and tokens are computed separately but share one softmax. In the forward pass, both parts
return sums relative to the same maximum; in the backward pass, both receive the output and the
denominator of the whole softmax. The prefix is therefore never broadcast over the batch: its logits
are one matrix product over all queries; likewise when rows use different prefixes (shared slots),
where a mask selects the rows of each. The token part has two implementations: `splash` for
programs compiled for TPUs (on any machine), and `dense` elsewhere. Terms outside the softmax (gated
adapters, Prefix-Tuning+) are added to its output.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from prefix_jax.nn.attention import dense, splash
from prefix_jax.nn.attention.dense import MASKED, cap, cap_bias_mask, dbias, dot, softmax_vjp
from prefix_jax.nn.attention.mask import MaskAndBias
from prefix_jax.nn.attention.splash_run import interpreting
from prefix_jax.nn.remat import keep
from prefix_jax.prefix import Gated, KVPrefix, Memory, Outside, SharedSlots, Site


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    masking: MaskAndBias,
    site: Site | None,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Attends to tokens and, inside the same softmax, to a prefix.

    Only the output and the log-denominator of each query are saved for the backward pass, which
    recomputes the weights from them (Dao et al. 2022), so no T x S array outlives the forward pass.

    Args:
        q_BTNH: queries.
        k_BSKH: token keys; each key head serves N/K query heads.
        v_BSKH: token values.
        masking: the keys and prefix slots that each query sees.
        site: one layer of a prefix site (k_PKH, v_PKH, …), or None for the bare model. Its shared
            slots, if there are any, take the place of `inside`.
        scale: multiplies the logits, usually H ** -0.5.
        softcap: bounds the logits smoothly, to softcap * tanh(logits / softcap) (Gemma 2).

    Returns:
        out_BTNH in the dtype of `q_BTNH`. The softmax is computed in float32.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGTH = (q_BTNH * scale).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    if site is not None and site.shared:
        out_BKGTH = _attend_shared(softcap, q_BKGTH, k_BSKH, v_BSKH, masking, site.shared)
    else:
        inside = (
            None if site is None else jax.tree.map(lambda x: x.astype(q_BTNH.dtype), site.inside)
        )
        out_BKGTH = _attend(softcap, q_BKGTH, k_BSKH, v_BSKH, masking, inside)
    out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    if site is not None and site.outside is not None:
        out_BTNH = out_BTNH + outside(q_BTNH, site.outside, scale)
    return out_BTNH


def _attend_shared(
    softcap: float | None,
    q_BKGTH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    masking: MaskAndBias,
    shared: Sequence[SharedSlots],
) -> jax.Array:
    """Attends to tokens and to slots that rows share, in one softmax.

    The queries of all rows meet the keys of each prefix in one matrix product, and the mask removes
    the rows that do not use it. No row therefore needs a copy of its slots.
    """
    assert masking.mask_BTP is not None, "shared slots require mask_BTP"
    B, K, G, T, H = q_BKGTH.shape
    # With key heads first, the products need no transposition of their operands or results.
    q_KMH = q_BKGTH.swapaxes(0, 1).reshape(K, B * G * T, H)
    parts = []
    first = 0
    for slots in shared:
        P = slots.k_KPH.shape[1]
        mask_BTP = masking.mask_BTP[:, :, first : first + P]
        first += P
        logits_KBGTP = dot("KMH,KPH->KMP", q_KMH, slots.k_KPH.astype(q_KMH.dtype))
        logits_KBGTP = cap(softcap, logits_KBGTP).reshape(K, B, G, T, P)
        logits_KBGTP += slots.bias_NP.astype(jnp.float32).reshape(K, 1, G, 1, P)
        parts.append((slots, mask_BTP, jnp.where(mask_BTP[:, None], logits_KBGTP, MASKED)))
    shared_max_KBGT1 = functools.reduce(
        jnp.maximum, [logits_KBGTP.max(axis=-1, keepdims=True) for _, _, logits_KBGTP in parts]
    )
    tokens = _token_attention(softcap, q_BKGTH, k_BSKH, masking)
    out_BKGTH, denominator_BKGT1, max_BKGT1 = tokens(
        q_BKGTH, k_BSKH, v_BSKH, masking, shared_max_KBGT1.swapaxes(0, 1)
    )
    max_KBGT1 = max_BKGT1.swapaxes(0, 1)
    for slots, mask_BTP, logits_KBGTP in parts:
        weights_KBGTP = jnp.exp(logits_KBGTP - max_KBGT1)
        denominator_BKGT1 += weights_KBGTP.sum(axis=-1, keepdims=True).swapaxes(0, 1)
        weights_KMP = weights_KBGTP.reshape(K, B * G * T, -1).astype(v_BSKH.dtype)
        out_KMH = dot("KMP,KPH->KMH", weights_KMP, slots.v_KPH.astype(v_BSKH.dtype))
        # Values that are NaN would reach rows of other prefixes even through weights of zero.
        seen_BT1 = mask_BTP.any(axis=-1, keepdims=True)
        added_KBGTH = jnp.where(seen_BT1[:, None], out_KMH.reshape(K, B, G, T, H), 0)
        out_BKGTH += added_KBGTH.swapaxes(0, 1)
    return (out_BKGTH / denominator_BKGT1).astype(q_BKGTH.dtype)


def outside(q_BTNH: jax.Array, added: Outside, scale: float) -> jax.Array:
    """The term added outside the softmax over tokens, out_BTNH.

    Args:
        q_BTNH: queries.
        added: one layer of the term (k_PKH, v_PKH, gate_N; or m_NHH), or of one term per row.
        scale: multiplies the logits.
    """
    if isinstance(added, Memory):
        return _read_memory(q_BTNH, added)
    if isinstance(added, Gated):
        return _attend_gated(q_BTNH, added, scale)
    out_BTNH = jnp.zeros_like(q_BTNH)
    if added.gated is not None:
        out_BTNH += _attend_gated(q_BTNH, added.gated, scale, added.slots_B)
    if added.memory is not None:
        out_BTNH += _read_memory(q_BTNH, added.memory)
    return out_BTNH


def _read_memory(q_BTNH: jax.Array, memory: Memory) -> jax.Array:
    """Multiplies query features by m_NHH, or by m_BNHH, one matrix per row."""
    dtype = q_BTNH.dtype
    row = "B" * (memory.m_LNHH.ndim - 3)
    # The output head dimension is Y, because an einsum needs distinct letters.
    features_BTNH = jax.nn.elu(q_BTNH.astype(jnp.float32)).astype(dtype)
    return jnp.einsum(f"BTNH,{row}NHY->BTNY", features_BTNH, memory.m_LNHH.astype(dtype))


def _attend_gated(
    q_BTNH: jax.Array, gated: Gated, scale: float, slots_B: jax.Array | None = None
) -> jax.Array:
    """Attends to gated slots: k_PKH, or k_BPKH of which row b has `slots_B[b]` slots."""
    B, T, N, H = q_BTNH.shape
    dtype = q_BTNH.dtype
    k, v = gated.k_LPKH.astype(dtype), gated.v_LPKH.astype(dtype)
    row = "B" * (k.ndim - 3)
    q_BTKGH = (q_BTNH * scale).reshape(B, T, k.shape[-2], -1, H)
    logits_BTKGP = dot(f"BTKGH,{row}PKH->BTKGP", q_BTKGH, k)
    gate_BTNH = gated.gate_LN[:, None]
    if slots_B is not None:
        real_BP = jnp.arange(k.shape[1]) < slots_B[:, None]
        logits_BTKGP = jnp.where(real_BP[:, None, None, None], logits_BTKGP, MASKED)
        gate_BTNH = gated.gate_LN[:, None, :, None]
    weights_BTKGP = jax.nn.softmax(logits_BTKGP, axis=-1)
    out_BTKGH = dot(f"BTKGP,{row}PKH->BTKGH", weights_BTKGP.astype(dtype), v)
    return (out_BTKGH.reshape(B, T, N, H) * gate_BTNH).astype(dtype)


def _token_attention(
    softcap: float | None, q_BKGTH: jax.Array, k_BSKH: jax.Array, masking: MaskAndBias
) -> Callable[..., Any]:
    """Selects the forward pass of the token part."""
    return _by_platform(
        masking,
        q_BKGTH,
        k_BSKH,
        functools.partial(splash.forward, softcap),
        functools.partial(dense.forward, softcap),
    )


def _by_platform(
    masking: MaskAndBias,
    q_BKGTH: jax.Array,
    k_BSKH: jax.Array,
    kernel: Callable[..., Any],
    plain: Callable[..., Any],
) -> Callable[..., Any]:
    """Selects the token part for the platform that the program is lowered for.

    The choice is made inside each pass: differentiating through it would keep the residuals of
    both paths.
    """
    if not splash.fits(q_BKGTH, k_BSKH, masking):
        return plain
    if interpreting():
        return kernel
    return functools.partial(jax.lax.platform_dependent, tpu=kernel, default=plain)


def _prefix_logits(
    softcap: float | None, q_BKGTH: jax.Array, masking: MaskAndBias, inside: KVPrefix
) -> jax.Array:
    """Masked float32 logits of the prefix, [B, K, G, T, P]."""
    K, G = q_BKGTH.shape[1:3]
    products_BKGTP = dot("BKGTH,PKH->BKGTP", q_BKGTH, inside.k_LPKH)
    logits_BKGTP = cap_bias_mask(softcap, products_BKGTP, masking.bias_BNTP, masking.mask_BTP)
    if inside.bias_LPN is not None:
        logits_BKGTP = logits_BKGTP + inside.bias_LPN.T.reshape(K, G, 1, -1)
        logits_BKGTP = jnp.maximum(logits_BKGTP, MASKED)
    return logits_BKGTP


def _forward(
    softcap: float | None,
    q_BKGTH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    masking: MaskAndBias,
    inside: KVPrefix | None,
) -> tuple[jax.Array, Any]:
    prefix_BKGTP = prefix_max_BKGT1 = None
    if inside is not None:
        prefix_BKGTP = _prefix_logits(softcap, q_BKGTH, masking, inside)
        prefix_max_BKGT1 = prefix_BKGTP.max(axis=-1, keepdims=True)

    tokens = _token_attention(softcap, q_BKGTH, k_BSKH, masking)
    out_BKGTH, denominator_BKGT1, max_BKGT1 = tokens(
        q_BKGTH, k_BSKH, v_BSKH, masking, prefix_max_BKGT1
    )
    if inside is not None and prefix_BKGTP is not None:
        prefix_BKGTP = jnp.exp(prefix_BKGTP - max_BKGT1)
        denominator_BKGT1 += prefix_BKGTP.sum(axis=-1, keepdims=True)
        out_BKGTH += dot("BKGTP,PKH->BKGTH", prefix_BKGTP.astype(v_BSKH.dtype), inside.v_LPKH)

    out_BKGTH = keep("mixed", (out_BKGTH / denominator_BKGT1).astype(q_BKGTH.dtype))
    log_denominator_BKGT1 = keep("mixed", max_BKGT1 + jnp.log(denominator_BKGT1))
    return out_BKGTH, (q_BKGTH, k_BSKH, v_BSKH, masking, inside, out_BKGTH, log_denominator_BKGT1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    softcap: float | None,
    q_BKGTH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    masking: MaskAndBias,
    inside: KVPrefix | None,
) -> jax.Array:
    return _forward(softcap, q_BKGTH, k_BSKH, v_BSKH, masking, inside)[0]


def _backward(softcap: float | None, saved: Any, dout_BKGTH: jax.Array) -> tuple[Any, ...]:
    q_BKGTH, k_BSKH, v_BSKH, masking, inside, out_BKGTH, log_denominator_BKGT1 = saved
    dtype = q_BKGTH.dtype
    tokens = _by_platform(
        masking,
        q_BKGTH,
        k_BSKH,
        functools.partial(splash.backward, softcap),
        functools.partial(dense.backward, softcap),
    )
    dq_BKGTH, dk_BSKH, dv_BSKH, dbias_BNTS = tokens(
        q_BKGTH, k_BSKH, v_BSKH, masking, out_BKGTH, log_denominator_BKGT1, dout_BKGTH
    )
    dmasking = MaskAndBias(None, bias_BNTS=dbias_BNTS)

    dinside = None
    if inside is not None:
        weights_BKGTP, dproducts_BKGTP, dlogits_BKGTP = softmax_vjp(
            softcap, out_BKGTH, log_denominator_BKGT1, dout_BKGTH
        )(
            _prefix_logits(softcap, q_BKGTH, masking, inside),
            dot("BKGTH,PKH->BKGTP", dout_BKGTH, inside.v_LPKH),
            lambda: dot("BKGTH,PKH->BKGTP", q_BKGTH, inside.k_LPKH),
        )
        dq_BKGTH += dot("BKGTP,PKH->BKGTH", dproducts_BKGTP, inside.k_LPKH)
        dmasking = dataclasses.replace(dmasking, bias_BNTP=dbias(dlogits_BKGTP, masking.bias_BNTP))
        dbias_PN = None
        if inside.bias_LPN is not None:
            dbias_PN = dlogits_BKGTP.sum(axis=(0, 3)).reshape(inside.bias_LPN.shape[::-1]).T
            dbias_PN = dbias_PN.astype(inside.bias_LPN.dtype)
        dinside = KVPrefix(
            dot("BKGTP,BKGTH->PKH", dproducts_BKGTP, q_BKGTH).astype(dtype),
            dot("BKGTP,BKGTH->PKH", weights_BKGTP, dout_BKGTH).astype(dtype),
            dbias_PN,
        )
    return dq_BKGTH.astype(dtype), dk_BSKH, dv_BSKH, dmasking, dinside


_attend.defvjp(_forward, _backward)
