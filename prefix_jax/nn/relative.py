"""Relative position bias on attention logits (T5, Raffel et al. 2020)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax.validation import PositiveInt, check_fields


@dataclasses.dataclass(frozen=True)
class Relative:
    """Maps distances to buckets, each of which has a bias per head.

    Attributes:
        buckets: R, the number of buckets.
        farthest: distances from here on share the last bucket.
        both_ways: whether keys after the query have separate buckets (encoders).
    """

    buckets: PositiveInt
    farthest: PositiveInt
    both_ways: bool

    def __post_init__(self) -> None:
        """Raises ValueError if a value has the wrong type or is out of range."""
        check_fields(self, error=ValueError)

    def bucket(self, distance: np.ndarray) -> np.ndarray:
        """Buckets of distances (query position minus key position), in the same shape.

        Computed on the host: a logarithm with different rounding, such as XLA's on TPUs, would put
        distances into other buckets than in pretraining.
        """
        count = self.buckets // 2 if self.both_ways else self.buckets
        first = np.where(distance < 0, count, 0) if self.both_ways else 0
        distance = np.abs(distance) if self.both_ways else np.maximum(distance, 0)
        # Half of the buckets hold exact distances, the others logarithmic ranges.
        exact = count // 2
        ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
        ratio = ratio / np.float32(math.log(self.farthest / exact)) * np.float32(count - exact)
        far = np.minimum(exact + ratio.astype(np.int32), count - 1)
        return first + np.where(distance < exact, distance, far)

    def bias(self, table_RN: jax.Array, query_BT: jax.Array, key_BS: jax.Array) -> jax.Array:
        """bias_BNTS for queries at positions `query_BT` and keys at `key_BS`, float32."""
        far = self.farthest
        # XN: one row per distance from -far to far; longer distances are clipped.
        bias_XN = table_RN.astype(jnp.float32)[self.bucket(np.arange(-far, far + 1))]
        distance_BTS = jnp.clip(query_BT[:, :, None] - key_BS[:, None, :], -far, far)
        return bias_XN[distance_BTS + far].transpose(0, 3, 1, 2)
