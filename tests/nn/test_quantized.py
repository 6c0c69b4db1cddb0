"""Quantised weights are close to the original, and products match the dequantised weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_jax.nn.quantized import QTensor, dequantize, matmul, quantize, take

# Blocks of a w_DNH with input D: one scale per output, and one per 8 inputs of each output.
BLOCKS = {8: (1, 4, 6), 4: (2, 4, 6)}


def _weight(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@given(
    st.sampled_from([4, 8]),
    st.integers(0, 1000),
    st.floats(-30, 30),
    st.floats(-3, 3),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_rounding_error_is_at_most_half_a_step(
    bits: int, seed: int, magnitude: float, shift: float, dtype: str
) -> None:
    """Plus the error of bfloat16 scales and zeros at the ends of the range."""
    if dtype == "float16":
        magnitude = min(max(magnitude, -10), 10)
    w_DNH = ((_weight(seed, 16, 4, 6) + np.float32(shift)) * np.float32(2.0**magnitude)).astype(
        jnp.dtype(dtype)
    )
    quantised = quantize(w_DNH, bits, BLOCKS[bits], np.float32)
    off = np.abs(np.asarray(dequantize(quantised)) - w_DNH.astype(np.float32))
    levels = 127 if bits == 8 else 8
    top = np.abs(np.asarray(quantised.zero) if bits == 4 else 0.0)
    bound = np.asarray(quantised.scale) * (0.5 + levels / 256) + top / 256
    bound_DNH = np.repeat(bound, 16 // bound.shape[0], axis=0)
    assert (off <= bound_DNH * 1.001).all()


def test_zeros_are_exact() -> None:
    for bits in (4, 8):
        quantised = quantize(np.zeros((16, 4, 6), np.float32), bits, BLOCKS[bits], np.float32)
        np.testing.assert_array_equal(np.asarray(dequantize(quantised)), 0.0)


def test_four_bits_reproduce_blocks_of_sixteen_values() -> None:
    """For example Q4_1 blocks of a GGUF file, in which the minimum and maximum both occur."""
    rng = np.random.default_rng(0)
    level = rng.integers(0, 16, size=(2, 8, 4, 6))
    level[:, 0], level[:, 1] = 0, 15
    w_DNH = (level * 0.25 - 1.5).reshape(16, 4, 6).astype(np.float32)
    quantised = quantize(w_DNH, 4, BLOCKS[4], np.float32)
    np.testing.assert_array_equal(np.asarray(dequantize(quantised)), w_DNH)


@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_are_equal_on_host_and_device_and_in_both_dtypes(bits: int) -> None:
    w_DNH = _weight(0, 16, 4, 6)
    on_host = quantize(w_DNH, bits, BLOCKS[bits], np.float32)
    on_device = quantize(jnp.asarray(w_DNH), bits, BLOCKS[bits], jnp.bfloat16)
    assert isinstance(on_host.q, np.ndarray)
    for ours, theirs in zip(jax.tree.leaves(on_host), jax.tree.leaves(on_device), strict=True):
        np.testing.assert_array_equal(ours.astype(np.float32), np.asarray(theirs, np.float32))


def test_has_the_shape_size_and_dtype_of_the_weight() -> None:
    quantised = quantize(_weight(0, 16, 4, 6), 4, BLOCKS[4], jnp.bfloat16)
    assert (quantised.shape, quantised.size) == ((16, 4, 6), 16 * 4 * 6)
    assert (quantised.dtype, quantised.q.dtype) == (jnp.bfloat16, jnp.int4)


CASES = {
    "to heads": ((16, 4, 6), {}, {8: (1, 4, 6), 4: (2, 4, 6)}),
    "from heads": ((2, 8, 6), {"inputs": 2}, {8: (1, 1, 6), 4: (2, 2, 6)}),
    "matrix": ((16, 6), {}, {8: (1, 6), 4: (2, 6)}),
    "transposed": ((6, 16), {"transposed": True}, {8: (6, 1), 4: (6, 2)}),
}


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_products_and_gradients_match_the_dequantised_weight(case: str, bits: int | None) -> None:
    shape, options, blocks = CASES[case]
    plain = weight = jnp.asarray(_weight(1, *shape))
    if bits is not None:
        weight = quantize(plain, bits, blocks[bits], np.float32)
        plain = dequantize(weight)
    heads = options.get("inputs", 1) == 2
    x = jnp.asarray(_weight(2, 3, 5, *(shape[:2] if heads else (16,))))
    spec = {"to heads": "btd,dnh->btnh", "from heads": "btnh,nhd->btd"}.get(
        case, "btd,vd->btv" if options else "btd,df->btf"
    )

    def ours(x: jax.Array) -> jax.Array:
        return matmul(x, weight, **options)

    y, back = jax.vjp(ours, x)
    expected, expected_back = jax.vjp(lambda x: jnp.einsum(spec, x, plain), x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    g = jnp.asarray(_weight(3, *y.shape))
    np.testing.assert_allclose(back(g)[0], expected_back(g)[0], rtol=1e-5, atol=1e-5)


def test_scan_keeps_no_dequantised_copy_of_the_stack() -> None:
    """The backward pass receives the integers of each layer and dequantises them again."""
    weights = jax.vmap(lambda w: quantize(w, 4, (2, 16), jnp.float32))(
        jnp.asarray(_weight(0, 3, 16, 16))
    )

    def loss(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(matmul(x, w)), None), x, weights)[0].sum()

    kept = jax.eval_shape(lambda x: jax.vjp(loss, x)[1], jnp.ones((5, 16)))
    floats = [leaf for leaf in jax.tree.leaves(kept) if leaf.dtype == jnp.float32]
    assert (3, 16, 16) not in [leaf.shape for leaf in floats]


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_take_looks_up_rows_of_a_table(bits: int | None) -> None:
    table: jax.Array | QTensor = jnp.asarray(_weight(0, 10, 16))
    whole = table
    if bits is not None:
        table = quantize(table, bits, (10, 1) if bits == 8 else (10, 2), jnp.float32)
        whole = dequantize(table)
    ids_BT = jnp.asarray([[3, 9, 3], [0, 1, 2]])
    np.testing.assert_array_equal(np.asarray(take(table, ids_BT)), np.asarray(whole)[ids_BT])
