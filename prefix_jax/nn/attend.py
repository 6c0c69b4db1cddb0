"""The one attention over a prefix and tokens."""

from __future__ import annotations

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

    The prefix is never copied to the rows of the batch: its logits are one matrix product over
    all queries, and both parts share a maximum and a denominator.

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
    q_BTKGH = (q_BTNH * scale).reshape(B, T, K, N // K, H)

    def scores(spec: str, keys: jax.Array) -> jax.Array:
        return jnp.einsum(spec, q_BTKGH, keys, preferred_element_type=jnp.float32)

    def mix(spec: str, weights: jax.Array, values: jax.Array) -> jax.Array:
        weights = weights.astype(values.dtype)
        return jnp.einsum(spec, weights, values, preferred_element_type=jnp.float32)

    logits_BKGTS = scores("BTKGH,BSKH->BKGTS", k_BSKH)
    logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS, MASKED)
    peak_BKGT1 = logits_BKGTS.max(axis=-1, keepdims=True)

    if join is not None:
        logits_BKGTP = scores("BTKGH,PKH->BKGTP", join.k_LPKH.astype(q_BTNH.dtype))
        if join.bias_LPN is not None:
            bias_KG1P = join.bias_LPN.T.reshape(K, N // K, 1, -1)
            logits_BKGTP = jnp.maximum(logits_BKGTP + bias_KG1P, MASKED)
        if mask_BTP is not None:
            logits_BKGTP = jnp.where(mask_BTP[:, None, None], logits_BKGTP, MASKED)
        peak_BKGT1 = jnp.maximum(peak_BKGT1, logits_BKGTP.max(axis=-1, keepdims=True))

    peak_BKGT1 = jax.lax.stop_gradient(peak_BKGT1)
    weights_BKGTS = jnp.exp(logits_BKGTS - peak_BKGT1)
    total_BKGT = weights_BKGTS.sum(axis=-1)
    out_BKGTH = mix("BKGTS,BSKH->BKGTH", weights_BKGTS, v_BSKH)

    if join is not None:
        weights_BKGTP = jnp.exp(logits_BKGTP - peak_BKGT1)
        total_BKGT += weights_BKGTP.sum(axis=-1)
        out_BKGTH += mix("BKGTP,PKH->BKGTH", weights_BKGTP, join.v_LPKH.astype(v_BSKH.dtype))

    out_BKGTH = out_BKGTH / total_BKGT[..., None]
    return jnp.moveaxis(out_BKGTH, 3, 1).reshape(B, T, N, H).astype(q_BTNH.dtype)
