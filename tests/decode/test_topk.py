from __future__ import annotations

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prefix_jax.decode.topk import top_k

TOP_K = jax.jit(top_k, static_argnums=1)


@given(
    vocab=st.sampled_from([5, 700, 4096]),
    k=st.sampled_from([1, 4]),
    levels=st.sampled_from([1, 3, 10_000]),
    seed=st.integers(0, 99),
)
def test_top_k_is_exact_including_ties(vocab, k, levels, seed) -> None:
    x_RV = np.random.default_rng(seed).integers(0, levels, (2, vocab)).astype(np.float32)
    values_Rk, index_Rk = TOP_K(x_RV, k)
    np.testing.assert_array_equal(values_Rk, jax.lax.top_k(x_RV, k)[0])
    np.testing.assert_array_equal(np.take_along_axis(x_RV, index_Rk, axis=1), values_Rk)
    assert all(len(set(row)) == k for row in np.asarray(index_Rk).tolist())
