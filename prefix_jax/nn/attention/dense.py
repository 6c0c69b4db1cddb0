"""Token attention in plain XLA, which materialises the T x S attention weights.

`splash` computes the same on TPUs without materialising them. Both modules have a `forward` and a
`backward` with the same signature; `attend` chooses between them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from prefix_jax.nn.attention.mask import MaskAndBias

# Finite, so that a query that sees nothing (padding without a prefix) does not become NaN.
MASKED = -1e30


def forward(
    softcap: float | None,
    q_BKGTH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    masking: MaskAndBias,
    prefix_max_BKGT1: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention over the tokens, before division by the softmax denominator.

    Args:
        softcap: bounds the logits, or None.
        q_BKGTH: scaled queries, grouped by key head (G queries per key head).
        k_BSKH: keys.
        v_BSKH: values.
        masking: the keys that each query sees.
        prefix_max_BKGT1: the largest logit of each query over the prefix, or None without a prefix.

    Returns:
        sum_BKGTH, the weighted sum of values; denominator_BKGT1, the sum of weights; and max_BKGT1,
        the largest logit, which is subtracted before exponentiation. All float32.
    """
    logits_BKGTS = _logits(softcap, q_BKGTH, k_BSKH, masking)
    max_BKGT1 = logits_BKGTS.max(axis=-1, keepdims=True)
    if prefix_max_BKGT1 is not None:
        max_BKGT1 = jnp.maximum(max_BKGT1, prefix_max_BKGT1)
    weights_BKGTS = jnp.exp(logits_BKGTS - max_BKGT1)
    denominator_BKGT1 = weights_BKGTS.sum(axis=-1, keepdims=True)
    sum_BKGTH = dot("BKGTS,BSKH->BKGTH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return sum_BKGTH, denominator_BKGT1, max_BKGT1


def backward(
    softcap: float | None,
    q_BKGTH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    masking: MaskAndBias,
    out_BKGTH: jax.Array,
    log_denominator_BKGT1: jax.Array,
    dout_BKGTH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of the token part of a softmax that may also cover a prefix.

    Args:
        softcap, q_BKGTH, k_BSKH, v_BSKH, masking: as in `forward`.
        out_BKGTH: the output of the whole softmax.
        log_denominator_BKGT1: the logarithm of its denominator.
        dout_BKGTH: the gradient of `out_BKGTH`.

    Returns:
        dq_BKGTH in float32, dk_BSKH, dv_BSKH, and the gradient of `masking.bias_BNTS` or None.
    """
    dlogits_of = softmax_vjp(softcap, out_BKGTH, log_denominator_BKGT1, dout_BKGTH)
    weights_BKGTS, dproducts_BKGTS, dlogits_BKGTS = dlogits_of(
        _logits(softcap, q_BKGTH, k_BSKH, masking),
        dot("BKGTH,BSKH->BKGTS", dout_BKGTH, v_BSKH),
        lambda: dot("BKGTH,BSKH->BKGTS", q_BKGTH, k_BSKH),
    )
    return (
        dot("BKGTS,BSKH->BKGTH", dproducts_BKGTS, k_BSKH),
        dot("BKGTS,BKGTH->BSKH", dproducts_BKGTS, q_BKGTH).astype(k_BSKH.dtype),
        dot("BKGTS,BKGTH->BSKH", weights_BKGTS, dout_BKGTH).astype(v_BSKH.dtype),
        dbias(dlogits_BKGTS, masking.bias_BNTS),
    )


def _logits(
    softcap: float | None, q_BKGTH: jax.Array, k_BSKH: jax.Array, masking: MaskAndBias
) -> jax.Array:
    """Masked logits_BKGTS."""
    products_BKGTS = dot("BKGTH,BSKH->BKGTS", q_BKGTH, k_BSKH)
    return cap_bias_mask(softcap, products_BKGTS, masking.bias_BNTS, masking.mask_BTS)


# Shared with the prefix part in `attend`.


def dot(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """An einsum of arrays in the model's dtype, accumulated and returned in float32."""
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


def cap(softcap: float | None, products: jax.Array) -> jax.Array:
    """Applies the soft cap to query-key products."""
    return products if softcap is None else softcap * jnp.tanh(products / softcap)


def cap_bias_mask(
    softcap: float | None,
    products_BKGTS: jax.Array,
    bias_BNTS: jax.Array | None,
    mask_BTS: jax.Array | None,
) -> jax.Array:
    """Turns query-key products into logits: applies the soft cap, the bias and the mask."""
    _, K, G = products_BKGTS.shape[:3]
    logits = cap(softcap, products_BKGTS)
    if bias_BNTS is not None:
        logits = logits + bias_BNTS.reshape(bias_BNTS.shape[0], K, G, *bias_BNTS.shape[2:])
    return logits if mask_BTS is None else jnp.where(mask_BTS[:, None, None], logits, MASKED)


def softmax_vjp(
    softcap: float | None,
    out_BKGTH: jax.Array,
    log_denominator_BKGT1: jax.Array,
    dout_BKGTH: jax.Array,
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """Backward pass through one part of a softmax.

    Returns:
        A function (logits, gradient of the weights, thunk that computes the query-key products) →
        weights, gradient of those products, gradient of the logits.
    """
    dtype = out_BKGTH.dtype
    # The softmax subtracts the weighted mean of the gradients, taken over prefix and tokens.
    mean_BKGT1 = jnp.sum(
        dout_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32), axis=-1, keepdims=True
    )

    def part(
        logits: jax.Array, dweights: jax.Array, products: Callable[[], jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        weights = jnp.exp(logits - log_denominator_BKGT1)
        dlogits = weights * (dweights - mean_BKGT1)
        dproducts = dlogits
        if softcap is not None:
            dproducts = dlogits * (1 - jnp.tanh(products() / softcap) ** 2)
        return weights.astype(dtype), dproducts.astype(dtype), dlogits

    return part


def dbias(dlogits_BKGTS: jax.Array, bias_BNTS: jax.Array | None) -> jax.Array | None:
    """The gradient of a bias on the logits, summed over the batch if the bias has one row."""
    if bias_BNTS is None:
        return None
    dbias_BNTS = dlogits_BKGTS.reshape(-1, *bias_BNTS.shape[1:])
    if bias_BNTS.shape[0] == 1:
        dbias_BNTS = dbias_BNTS.sum(axis=0, keepdims=True)
    return dbias_BNTS.astype(bias_BNTS.dtype)
