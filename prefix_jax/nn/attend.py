"""The one attention over a prefix and tokens.

The prefix is never copied to the rows of the batch: its logits are one matrix product over all
queries, and both parts share a maximum and a denominator. What stands beside the softmax (gated
adapters, Prefix-Tuning+) is added to its result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from prefix_jax.nn.mask import Seen
from prefix_jax.nn.remat import keep
from prefix_jax.prefix import Beside, KVPrefix, Memory, Site

# Finite, so that a row that sees nothing (padding without a prefix) stays free of NaN.
MASKED = -1e30


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    seen: Seen,
    site: Site | None,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Attends to tokens and, inside the same softmax, to a prefix.

    The backward pass keeps the output and the log-denominator of each query, and computes the
    weights again from them (Dao et al. 2022), so no array of T x S survives the forward pass.

    Args:
        q_BTNH: queries.
        k_BSKH: keys of the tokens; each serves N/K query heads.
        v_BSKH: values of the tokens.
        seen: which keys and prefix slots each query sees.
        site: one layer of a site of a prefix (k_PKH, v_PKH, …), or None for the bare model.
        scale: multiplies the logits, H ** -0.5 as a rule.
        softcap: bounds the logits smoothly, to softcap * tanh(logits / softcap) (Gemma 2).

    Returns:
        out_BTNH in the dtype of `q_BTNH`. Softmax is computed in float32.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGTH = (q_BTNH * scale).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    join = None if site is None else jax.tree.map(lambda x: x.astype(q_BTNH.dtype), site.join)
    out_BKGTH = _attend(softcap, q_BKGTH, k_BSKH, v_BSKH, seen, join)
    out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    if site is not None and site.beside is not None:
        out_BTNH = out_BTNH + beside(q_BTNH, site.beside, scale)
    return out_BTNH


def beside(q_BTNH: jax.Array, added: Beside, scale: float) -> jax.Array:
    """What queries gain beside the softmax over tokens, out_BTNH.

    Args:
        q_BTNH: queries.
        added: one layer of it (k_PKH, v_PKH, gate_N; or m_NHH).
        scale: multiplies the logits.
    """
    B, T, N, H = q_BTNH.shape
    dtype = q_BTNH.dtype
    if isinstance(added, Memory):
        # Heads are Y on the way out, so that the letters of an einsum differ.
        features_BTNH = jax.nn.elu(q_BTNH.astype(jnp.float32)).astype(dtype)
        return jnp.einsum("BTNH,NHY->BTNY", features_BTNH, added.m_LNHH.astype(dtype))
    k_PKH, v_PKH = added.k_LPKH.astype(dtype), added.v_LPKH.astype(dtype)
    q_BTKGH = (q_BTNH * scale).reshape(B, T, k_PKH.shape[1], -1, H)
    weights_BTKGP = jax.nn.softmax(_dot("BTKGH,PKH->BTKGP", q_BTKGH, k_PKH), axis=-1)
    out_BTKGH = _dot("BTKGP,PKH->BTKGH", weights_BTKGP.astype(dtype), v_PKH)
    return (out_BTKGH.reshape(B, T, N, H) * added.gate_LN[:, None]).astype(dtype)


def _dot(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """A product of arrays in the model's dtype, accumulated and returned in float32."""
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


def _logits(
    softcap: float | None,
    q_BKGTH: jax.Array,
    k_BSKH: jax.Array,
    seen: Seen,
    join: KVPrefix | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Masked float32 logits of the tokens [B, K, G, T, S], and of the prefix [B, K, G, T, P]."""
    K, G = q_BKGTH.shape[1:3]

    def finish(
        logits: jax.Array, bias_BNTS: jax.Array | None, mask_BTS: jax.Array | None
    ) -> jax.Array:
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        if bias_BNTS is not None:
            logits = logits + bias_BNTS.reshape(bias_BNTS.shape[0], K, G, *bias_BNTS.shape[2:])
        return logits if mask_BTS is None else jnp.where(mask_BTS[:, None, None], logits, MASKED)

    tokens_BKGTS = _dot("BKGTH,BSKH->BKGTS", q_BKGTH, k_BSKH)
    tokens_BKGTS = finish(tokens_BKGTS, seen.bias_BNTS, seen.mask_BTS)
    if join is None:
        return tokens_BKGTS, None
    prefix_BKGTP = _dot("BKGTH,PKH->BKGTP", q_BKGTH, join.k_LPKH)
    prefix_BKGTP = finish(prefix_BKGTP, seen.bias_BNTP, seen.mask_BTP)
    if join.bias_LPN is not None:
        prefix_BKGTP = prefix_BKGTP + join.bias_LPN.T.reshape(K, G, 1, -1)
        prefix_BKGTP = jnp.maximum(prefix_BKGTP, MASKED)
    return tokens_BKGTS, prefix_BKGTP


def _forward(
    softcap: float | None,
    q_BKGTH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    seen: Seen,
    join: KVPrefix | None,
) -> tuple[jax.Array, Any]:
    tokens_BKGTS, prefix_BKGTP = _logits(softcap, q_BKGTH, k_BSKH, seen, join)
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

    out_BKGTH = keep("mixed", (out_BKGTH / total_BKGT1).astype(q_BKGTH.dtype))
    log_total_BKGT1 = keep("mixed", peak_BKGT1 + jnp.log(total_BKGT1))
    return out_BKGTH, (q_BKGTH, k_BSKH, v_BSKH, seen, join, out_BKGTH, log_total_BKGT1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    softcap: float | None,
    q_BKGTH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    seen: Seen,
    join: KVPrefix | None,
) -> jax.Array:
    return _forward(softcap, q_BKGTH, k_BSKH, v_BSKH, seen, join)[0]


def _backward(softcap: float | None, saved: Any, dout_BKGTH: jax.Array) -> tuple[Any, ...]:
    q_BKGTH, k_BSKH, v_BSKH, seen, join, out_BKGTH, log_total_BKGT1 = saved
    dtype = q_BKGTH.dtype
    tokens_BKGTS, prefix_BKGTP = _logits(softcap, q_BKGTH, k_BSKH, seen, join)
    # A weight's gradient counts relative to the mean over the whole softmax, prefix included.
    mean_BKGT1 = jnp.sum(
        dout_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32), axis=-1, keepdims=True
    )

    def through_softmax(
        logits: jax.Array, dweights: jax.Array, products: Callable[[], jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Weights, the gradient of the products of queries and keys, that of the logits."""
        weights = jnp.exp(logits - log_total_BKGT1)
        dlogits = weights * (dweights - mean_BKGT1)
        dproducts = dlogits
        if softcap is not None:
            dproducts = dlogits * (1 - jnp.tanh(products() / softcap) ** 2)
        return weights.astype(dtype), dproducts.astype(dtype), dlogits

    dweights_BKGTS = _dot("BKGTH,BSKH->BKGTS", dout_BKGTH, v_BSKH)
    weights_BKGTS, dproducts_BKGTS, dlogits_BKGTS = through_softmax(
        tokens_BKGTS, dweights_BKGTS, lambda: _dot("BKGTH,BSKH->BKGTS", q_BKGTH, k_BSKH)
    )
    dq_BKGTH = _dot("BKGTS,BSKH->BKGTH", dproducts_BKGTS, k_BSKH)
    dk_BSKH = _dot("BKGTS,BKGTH->BSKH", dproducts_BKGTS, q_BKGTH).astype(k_BSKH.dtype)
    dv_BSKH = _dot("BKGTS,BKGTH->BSKH", weights_BKGTS, dout_BKGTH).astype(v_BSKH.dtype)
    dseen = Seen(None, bias_BNTS=_dbias(dlogits_BKGTS, seen.bias_BNTS))

    djoin = None
    if join is not None and prefix_BKGTP is not None:
        dweights_BKGTP = _dot("BKGTH,PKH->BKGTP", dout_BKGTH, join.v_LPKH)
        weights_BKGTP, dproducts_BKGTP, dlogits_BKGTP = through_softmax(
            prefix_BKGTP, dweights_BKGTP, lambda: _dot("BKGTH,PKH->BKGTP", q_BKGTH, join.k_LPKH)
        )
        dq_BKGTH += _dot("BKGTP,PKH->BKGTH", dproducts_BKGTP, join.k_LPKH)
        dseen = dataclasses.replace(dseen, bias_BNTP=_dbias(dlogits_BKGTP, seen.bias_BNTP))
        dbias_PN = None
        if join.bias_LPN is not None:
            dbias_PN = dlogits_BKGTP.sum(axis=(0, 3)).reshape(join.bias_LPN.shape[::-1]).T
            dbias_PN = dbias_PN.astype(join.bias_LPN.dtype)
        djoin = KVPrefix(
            _dot("BKGTP,BKGTH->PKH", dproducts_BKGTP, q_BKGTH).astype(dtype),
            _dot("BKGTP,BKGTH->PKH", weights_BKGTP, dout_BKGTH).astype(dtype),
            dbias_PN,
        )
    return dq_BKGTH.astype(dtype), dk_BSKH, dv_BSKH, dseen, djoin


def _dbias(dlogits_BKGTS: jax.Array, bias_BNTS: jax.Array | None) -> jax.Array | None:
    """The gradient of a bias that was added to logits; rows share it if it has one row."""
    if bias_BNTS is None:
        return None
    dbias_BNTS = dlogits_BKGTS.reshape(-1, *bias_BNTS.shape[1:])
    if bias_BNTS.shape[0] == 1:
        dbias_BNTS = dbias_BNTS.sum(axis=0, keepdims=True)
    return dbias_BNTS.astype(bias_BNTS.dtype)


_attend.defvjp(_forward, _backward)
