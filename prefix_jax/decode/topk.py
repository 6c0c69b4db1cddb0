"""Top-k over a vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_BLOCK = 128


def top_k(x_RV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest values of each row, largest first, and their columns.

    The result is exact, and faster than `jax.lax.top_k` and `jnp.argmax` when V is a vocabulary:
    the k largest values are in the k blocks with the largest maxima, so only those need sorting.
    """
    R, V = x_RV.shape
    if V <= k * _BLOCK:
        return jax.lax.top_k(x_RV, k)
    padded_RV = jnp.pad(x_RV, ((0, 0), (0, -V % _BLOCK)), constant_values=-jnp.inf)
    blocks_RCX = padded_RV.reshape(R, -1, _BLOCK)
    _, block_Rk = jax.lax.top_k(blocks_RCX.max(axis=-1), k)
    candidates_RkX = jnp.take_along_axis(blocks_RCX, block_Rk[:, :, None], axis=1)
    values_Rk, place_Rk = jax.lax.top_k(candidates_RkX.reshape(R, -1), k)
    block_Rk = jnp.take_along_axis(block_Rk, place_Rk // _BLOCK, axis=1)
    # Only a row with fewer than k finite values reaches into the padding.
    return values_Rk, jnp.minimum(block_Rk * _BLOCK + place_Rk % _BLOCK, V - 1)
