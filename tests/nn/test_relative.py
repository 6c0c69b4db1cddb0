"""Relative position buckets match T5's definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_jax.nn.relative import Relative

T5 = {False: Relative(32, 128, False), True: Relative(32, 128, True)}


def buckets(relative: Relative, *distances: int) -> list[int]:
    return relative.bucket(np.array(distances)).tolist()


def test_decoder_has_16_exact_and_16_logarithmic_buckets() -> None:
    """Query minus key, the past. 16 to 128 are evenly spaced on a logarithmic scale."""
    assert buckets(T5[False], *range(16)) == list(range(16))
    edges = np.ceil(16 * 8 ** (np.arange(16) / 16) - 1e-9).astype(int)
    assert buckets(T5[False], *edges) == list(range(16, 32))
    assert buckets(T5[False], *(edges[1:] - 1)) == list(range(16, 31))
    assert buckets(T5[False], 128, 1000) == [31, 31]


def test_decoder_puts_future_keys_into_bucket_0() -> None:
    assert buckets(T5[False], -1, -50) == [0, 0]


def test_encoder_splits_buckets_between_past_and_future() -> None:
    past = buckets(T5[True], 0, 1, 7, 8, 127, 128, 5000)
    assert past == [0, 1, 7, 8, 15, 15, 15]
    assert buckets(T5[True], -1, -7, -8, -127, -5000) == [17, 23, 24, 31, 31]
    # Ranges start at powers of two, where a differently rounded logarithm would be wrong.
    assert buckets(T5[True], 15, 16, 31, 32, 63, 64) == [9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("both_ways", [False, True])
@given(far=st.integers(0, 3000))
def test_buckets_increase_with_distance_and_stay_in_range(both_ways: bool, far: int) -> None:
    near, next_ = buckets(T5[both_ways], far, far + 1)
    assert 0 <= near <= next_ < 32


def test_bias_is_the_table_entry_of_the_bucket_for_every_head() -> None:
    relative, N = T5[False], 3
    table_RN = jax.random.normal(jax.random.key(0), (32, N))
    query_BT, key_BS = jnp.array([[4, 9], [0, 1]]), jnp.array([[0, 4, 8], [0, 1, 2]])
    bias_BNTS = relative.bias(table_RN.astype(jnp.bfloat16), query_BT, key_BS)
    assert bias_BNTS.shape == (2, N, 2, 3)
    assert bias_BNTS.dtype == jnp.float32
    for b, t, s in np.ndindex(2, 2, 3):
        (bucket,) = buckets(relative, int(query_BT[b, t] - key_BS[b, s]))
        expected = table_RN[bucket].astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(bias_BNTS[b, :, t, s], expected)
