"""Relative positions as a bias on attention's logits (T5, Raffel et al. 2020)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Relative:
    """How distances are put into buckets, each of which has a bias for every head.

    Attributes:
        buckets: R, their number.
        farthest: the distance from which on all share the last bucket.
        both_ways: whether keys after the query have buckets of their own (an encoder).
    """

    buckets: int
    farthest: int
    both_ways: bool

    def bucket(self, distance: jax.Array) -> jax.Array:
        """The bucket of a distance, query position minus key position: int32, the same shape."""
        count = self.buckets
        first = jnp.zeros_like(distance)
        if self.both_ways:
            count //= 2
            first = jnp.where(distance < 0, count, 0)
            distance = jnp.abs(distance)
        else:
            distance = jnp.maximum(distance, 0)
        # Half of the buckets are for exact distances, the others for logarithmic ranges.
        exact = count // 2
        ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
        far = exact + (ratio / math.log(self.farthest / exact) * (count - exact)).astype(jnp.int32)
        return first + jnp.where(distance < exact, distance, jnp.minimum(far, count - 1))

    def bias(self, table_RN: jax.Array, query_BT: jax.Array, key_BS: jax.Array) -> jax.Array:
        """bias_BNTS of keys at `key_BS` for queries at `query_BT`, float32."""
        bucket_BTS = self.bucket(query_BT[:, :, None] - key_BS[:, None, :])
        return table_RN.astype(jnp.float32)[bucket_BTS].transpose(0, 3, 1, 2)
