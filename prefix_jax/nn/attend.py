"""The one attention over a prefix and tokens.

The prefix is never copied to the rows of the batch: its logits are one matrix product over all
queries, and both parts share a maximum and a denominator.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from prefix_jax.prefix import KVPrefix

# Finite, so that a row that sees nothing (padding without a prefix) stays free of NaN.
MASKED = -1e30


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    join: KVPrefix | None,
    mask_BTP: jax.Array | None,
    scale: float,
) -> jax.Array:
    """Attends to tokens and, inside the same softmax, to a prefix.

    The backward pass keeps the output and the log-denominator of each query, and computes the
    weights again from them (Dao et al. 2022), so no array of T x S survives the forward pass.

    Args:
        q_BTNH: queries.
        k_BSKH: keys of the tokens; each serves N/K query heads.
        v_BSKH: values of the tokens.
        mask_BTS: True where a query sees a key.
        join: one layer of a prefix (k_PKH, v_PKH, bias_PN), or None for the bare model.
        mask_BTP: True where a query sees a prefix slot; None if all see all.
        scale: multiplies the logits, H ** -0.5 as a rule.

    Returns:
        out_BTNH in the dtype of `q_BTNH`. Softmax is computed in float32.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGTH = (q_BTNH * scale).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    if join is not None:
        join = jax.tree.map(lambda leaf: leaf.astype(q_BTNH.dtype), join)
    out_BKGTH = _attend(q_BKGTH, k_BSKH, v_BSKH, mask_BTS, join, mask_BTP)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _dot(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """A product of arrays in the model's dtype, accumulated and returned in float32."""
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


def _logits(
    q_BKGTH: jax.Array,
    k_BSKH: jax.Array,
    mask_BTS: jax.Array,
    join: KVPrefix | None,
    mask_BTP: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Masked float32 logits of the tokens [B, K, G, T, S], and of the prefix [B, K, G, T, P]."""
    tokens_BKGTS = _dot("BKGTH,BSKH->BKGTS", q_BKGTH, k_BSKH)
    tokens_BKGTS = jnp.where(mask_BTS[:, None, None], tokens_BKGTS, MASKED)
    if join is None:
        return tokens_BKGTS, None
    prefix_BKGTP = _dot("BKGTH,PKH->BKGTP", q_BKGTH, join.k_LPKH)
    if join.bias_LPN is not None:
        K, G = q_BKGTH.shape[1:3]
        prefix_BKGTP = prefix_BKGTP + join.bias_LPN.T.reshape(K, G, 1, -1)
        prefix_BKGTP = jnp.maximum(prefix_BKGTP, MASKED)
    if mask_BTP is not None:
        prefix_BKGTP = jnp.where(mask_BTP[:, None, None], prefix_BKGTP, MASKED)
    return tokens_BKGTS, prefix_BKGTP


def _forward(
    q_BKGTH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    join: KVPrefix | None,
    mask_BTP: jax.Array | None,
) -> tuple[jax.Array, Any]:
    tokens_BKGTS, prefix_BKGTP = _logits(q_BKGTH, k_BSKH, mask_BTS, join, mask_BTP)
    peak_BKGT1 = tokens_BKGTS.max(axis=-1, keepdims=True)
    if prefix_BKGTP is not None:
        peak_BKGT1 = jnp.maximum(peak_BKGT1, prefix_BKGTP.max(axis=-1, keepdims=True))

    tokens_BKGTS = jnp.exp(tokens_BKGTS - peak_BKGT1)
    total_BKGT1 = tokens_BKGTS.sum(axis=-1, keepdims=True)
    out_BKGTH = _dot("BKGTS,BSKH->BKGTH", tokens_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    if join is not None and prefix_BKGTP is not None:
        prefix_BKGTP = jnp.exp(prefix_BKGTP - peak_BKGT1)
        total_BKGT1 += prefix_BKGTP.sum(axis=-1, keepdims=True)
        out_BKGTH += _dot("BKGTP,PKH->BKGTH", prefix_BKGTP.astype(v_BSKH.dtype), join.v_LPKH)

    out_BKGTH = (out_BKGTH / total_BKGT1).astype(q_BKGTH.dtype)
    log_total_BKGT1 = peak_BKGT1 + jnp.log(total_BKGT1)
    arguments = (q_BKGTH, k_BSKH, v_BSKH, mask_BTS, join, mask_BTP)
    return out_BKGTH, (*arguments, out_BKGTH, log_total_BKGT1)


@jax.custom_vjp
def _attend(
    q_BKGTH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    join: KVPrefix | None,
    mask_BTP: jax.Array | None,
) -> jax.Array:
    return _forward(q_BKGTH, k_BSKH, v_BSKH, mask_BTS, join, mask_BTP)[0]


def _backward(saved: Any, dout_BKGTH: jax.Array) -> tuple[Any, ...]:
    q_BKGTH, k_BSKH, v_BSKH, mask_BTS, join, mask_BTP, out_BKGTH, log_total_BKGT1 = saved
    dtype = q_BKGTH.dtype
    tokens_BKGTS, prefix_BKGTP = _logits(q_BKGTH, k_BSKH, mask_BTS, join, mask_BTP)
    # A weight's gradient counts relative to the mean over the whole softmax, prefix included.
    mean_BKGT1 = jnp.sum(
        dout_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32), axis=-1, keepdims=True
    )

    def through_softmax(
        logits: jax.Array, dweights: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        weights = jnp.exp(logits - log_total_BKGT1)
        dlogits = weights * (dweights - mean_BKGT1)
        return weights.astype(dtype), dlogits.astype(dtype), dlogits

    dweights_BKGTS = _dot("BKGTH,BSKH->BKGTS", dout_BKGTH, v_BSKH)
    weights_BKGTS, dlogits_BKGTS, _ = through_softmax(tokens_BKGTS, dweights_BKGTS)
    dq_BKGTH = _dot("BKGTS,BSKH->BKGTH", dlogits_BKGTS, k_BSKH)
    dk_BSKH = _dot("BKGTS,BKGTH->BSKH", dlogits_BKGTS, q_BKGTH).astype(k_BSKH.dtype)
    dv_BSKH = _dot("BKGTS,BKGTH->BSKH", weights_BKGTS, dout_BKGTH).astype(v_BSKH.dtype)

    djoin = None
    if join is not None and prefix_BKGTP is not None:
        dweights_BKGTP = _dot("BKGTH,PKH->BKGTP", dout_BKGTH, join.v_LPKH)
        weights_BKGTP, dlogits_BKGTP, exact_BKGTP = through_softmax(prefix_BKGTP, dweights_BKGTP)
        dq_BKGTH += _dot("BKGTP,PKH->BKGTH", dlogits_BKGTP, join.k_LPKH)
        dbias_PN = None
        if join.bias_LPN is not None:
            dbias_PN = exact_BKGTP.sum(axis=(0, 3)).reshape(join.bias_LPN.shape[::-1]).T
            dbias_PN = dbias_PN.astype(join.bias_LPN.dtype)
        djoin = KVPrefix(
            _dot("BKGTP,BKGTH->PKH", dlogits_BKGTP, q_BKGTH).astype(dtype),
            _dot("BKGTP,BKGTH->PKH", weights_BKGTP, dout_BKGTH).astype(dtype),
            dbias_PN,
        )
    return dq_BKGTH.astype(dtype), dk_BSKH, dv_BSKH, None, djoin, None


_attend.defvjp(_forward, _backward)
