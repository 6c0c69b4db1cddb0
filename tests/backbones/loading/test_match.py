"""Matches names and shapes of a checkpoint with parameters."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_jax.backbones.families.names import Matrix, NameTable, Row, Vector
from prefix_jax.backbones.loading.match import match
from prefix_jax.errors import BackboneError

TABLE = NameTable(
    prefix="model.",
    rows=(
        Row("embed.weight", "embed/tokens_VD", Matrix(transposed=False)),
        Row("layers.{l}.q.weight", "layers/attn/q_DNH", Matrix()),
        Row("layers.{l}.q.bias", "layers/attn/q_bias_NH", Vector()),
        Row("layers.{l}.o.weight", "layers/attn/o_NHD", Matrix(2)),
    ),
    ignored=(r"layers\.\d+\.freq",),
)
D, N, H, V, L = 6, 2, 4, 5, 12
PARAMS = {
    "embed": {"tokens_VD": jax.ShapeDtypeStruct((V, D), np.float32)},
    "layers": {
        "attn": {
            "q_DNH": jax.ShapeDtypeStruct((L, D, N, H), np.float32),
            "o_NHD": jax.ShapeDtypeStruct((L, N, H, D), np.float32),
        }
    },
}
STORED = {
    "embed.weight": (V, D),
    **{f"layers.{layer}.q.weight": (N * H, D) for layer in range(L)},
    **{f"layers.{layer}.o.weight": (D, N * H) for layer in range(L)},
}


def test_parameters_get_their_tensors_in_layer_order() -> None:
    matched = {p.path: p for p in match(TABLE, PARAMS, STORED, "here")}
    q = matched["layers", "attn", "q_DNH"]
    assert q.names == tuple(f"layers.{layer}.q.weight" for layer in range(L))
    assert q.stacked
    assert matched["embed", "tokens_VD"].names == ("embed.weight",)
    assert not matched["embed", "tokens_VD"].stacked


def test_common_prefix_of_names_is_optional() -> None:
    prefixed = {f"model.{name}": shape for name, shape in STORED.items()}
    matched = {p.path: p for p in match(TABLE, PARAMS, prefixed, "here")}
    assert matched["embed", "tokens_VD"].names == ("model.embed.weight",)


def test_ignored_tensors_are_allowed() -> None:
    match(TABLE, PARAMS, {**STORED, "model.layers.0.freq": (3,)}, "here")


def test_reports_all_mismatches_at_once() -> None:
    stored = {**STORED, "layers.3.q.weight": (D, N * H), "layers.0.q.bias": (N * H,), "x.y": (1,)}
    del stored["embed.weight"], stored["layers.2.o.weight"], stored["layers.10.o.weight"]
    with pytest.raises(BackboneError) as error:
        match(TABLE, PARAMS, stored, "the/checkpoint")
    assert str(error.value) == (
        "the tensors in the/checkpoint do not fit its configuration\n"
        "  3 missing:\n    embed.weight\n    layers.2.o.weight\n    layers.10.o.weight\n"
        "  2 unexpected:\n    layers.0.q.bias\n    x.y\n"
        "  1 of the wrong shape:\n    layers.3.q.weight: (6, 8) instead of (8, 6)"
    )


def test_long_lists_are_truncated_and_counted() -> None:
    with pytest.raises(BackboneError) as error:
        match(TABLE, PARAMS, {"embed.weight": (V, D)}, "here")
    assert "  24 missing:" in str(error.value)
    assert "    … and 4 more" in str(error.value)


small = st.integers(1, 5)


@given(D=small, N=small, half=small, parts=st.integers(1, 3), transposed=st.booleans())
def test_stored_matrix_computes_the_same_product(
    D: int, N: int, half: int, parts: int, transposed: bool
) -> None:
    rng, H = np.random.default_rng(0), 2 * half
    x_D = rng.normal(size=D)
    for part in range(parts):
        storage = Matrix(transposed=transposed, part=part, parts=parts)
        w = rng.normal(size=storage.stored((D, N, H)))
        product = (w @ x_D if transposed else x_D @ w).reshape(parts, N, H)[part]
        w_DNH = storage(w, (D, N, H))
        np.testing.assert_allclose(np.einsum("D,DNH->NH", x_D, w_DNH), product)


@given(D=small, N=small, H=small, parts=st.integers(1, 3), transposed=st.booleans())
def test_splits_parts_that_are_fused_head_by_head(
    D: int, N: int, H: int, parts: int, transposed: bool
) -> None:
    rng = np.random.default_rng(0)
    x_D = rng.normal(size=D)
    for part in range(parts):
        storage = Matrix(transposed=transposed, part=part, parts=parts, by_head=True)
        w = rng.normal(size=storage.stored((D, N, H)))
        product = (w @ x_D if transposed else x_D @ w).reshape(N, parts, H)
        np.testing.assert_allclose(
            np.einsum("D,DNH->NH", x_D, storage(w, (D, N, H))), product[:, part]
        )
        bias = Vector(part=part, parts=parts, by_head=True)
        np.testing.assert_array_equal(bias(product.ravel(), (N, H)), product[:, part])


@given(D=small, N=small, half=small)
def test_splits_interleaved_rotary_halves(D: int, N: int, half: int) -> None:
    w_DNH = np.arange(D * N * 2 * half).reshape(D, N, 2 * half)
    # The reordering of q_proj.weight, [N * H, D], by llama.cpp's converter.
    stored = w_DNH.reshape(D, -1).T.reshape(N, 2, half, D).swapaxes(1, 2).reshape(-1, D)
    np.testing.assert_array_equal(Matrix(interleaved=True)(stored, w_DNH.shape), w_DNH)
    bias_NH = stored[:, 0]
    np.testing.assert_array_equal(Vector(interleaved=True)(bias_NH, w_DNH[0].shape), w_DNH[0])


def test_plain_storage_is_read_without_copies() -> None:
    w = np.zeros((N * H, D))
    assert np.shares_memory(Matrix()(w, (D, N, H)), w)
    assert np.shares_memory(Matrix(2)(w.T, (N, H, D)), w)
    assert np.shares_memory(Matrix(transposed=False, part=1, parts=2)(w, (N * H, 1, D // 2)), w)
    assert np.shares_memory(Matrix(part=1, parts=2, by_head=True)(w, (D, N, H // 2)), w)
