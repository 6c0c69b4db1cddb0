"""Attention matches a plain softmax over prefix and tokens, in values and gradients."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_jax.nn.attention.attend import attend
from prefix_jax.nn.attention.mask import MaskAndBias
from prefix_jax.prefix import Gated, KVPrefix, Memory, Outside, Site


class Case(NamedTuple):
    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    inside: KVPrefix | None
    mask_BTS: jax.Array
    mask_BTP: jax.Array | None
    bias_BNTS: jax.Array | None = None
    bias_BNTP: jax.Array | None = None


def make(
    B: int = 2,
    T: int = 5,
    S: int = 7,
    K: int = 2,
    G: int = 2,
    H: int = 4,
    P: int = 3,
    bias: bool = True,
    window: bool = True,
    relative: Literal["none", "shared", "own"] = "none",
    seed: int = 0,
) -> Case:
    """Random arrays; query 0 of row 0 sees nothing, like padding outside a window.

    With `relative`, logits have a bias, shared by all rows or separate for each row.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    mask_BTS = rng.random((B, T, S)) < 0.6
    mask_BTP = rng.random((B, T, P)) < 0.6
    mask_BTS[..., 0] = True
    mask_BTS[0, 0], mask_BTP[0, 0] = False, False
    inside = None
    if P:
        inside = KVPrefix(normal(P, K, H), normal(P, K, H), normal(P, K * G) if bias else None)
    bias_BNTS = bias_BNTP = None
    if relative != "none":
        rows = 1 if relative == "shared" else B
        bias_BNTS = normal(rows, K * G, T, S)
        bias_BNTP = normal(rows, K * G, T, P) if P else None
    return Case(
        normal(B, T, K * G, H),
        normal(B, S, K, H),
        normal(B, S, K, H),
        inside,
        jnp.asarray(mask_BTS),
        jnp.asarray(mask_BTP) if P and window else None,
        bias_BNTS,
        bias_BNTP,
    )


def reference(case: Case, scale: float, softcap: float | None = None) -> jax.Array:
    """One softmax over concatenated keys, repeated for each query head."""
    q, k, v, inside, mask_BTS, mask_BTP, added_BNTS, added_BNTP = case
    B, T, N, _ = q.shape
    bias_BNTS = jnp.where(mask_BTS, 0.0, -1e30)[:, None] * jnp.ones((1, N, 1, 1))
    if added_BNTS is not None:
        bias_BNTS += added_BNTS
    if inside is not None:
        P = inside.length
        k, v = (
            jnp.concatenate([jnp.broadcast_to(ours, (B, *ours.shape)), theirs], axis=1)
            for ours, theirs in ((inside.k_LPKH, k), (inside.v_LPKH, v))
        )
        bias_BNTP = jnp.zeros((B, N, T, P))
        if inside.bias_LPN is not None:
            bias_BNTP += jnp.maximum(inside.bias_LPN.T, -1e30)[None, :, None]
        if mask_BTP is not None:
            bias_BNTP = jnp.where(mask_BTP[:, None], bias_BNTP, -1e30)
        if added_BNTP is not None:
            bias_BNTP += added_BNTP
        bias_BNTS = jnp.concatenate([bias_BNTP, bias_BNTS], axis=-1)
    group = N // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    logits_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q, k) * scale
    if softcap is not None:
        logits_BNTS = softcap * jnp.tanh(logits_BNTS / softcap)
    logits_BNTS += bias_BNTS
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(logits_BNTS, axis=-1), v)


@functools.partial(jax.jit, static_argnums=1)
def ours(case: Case, softcap: float | None = None) -> jax.Array:
    q, k, v, inside, mask_BTS, mask_BTP, bias_BNTS, bias_BNTP = case
    masking = MaskAndBias(mask_BTS, mask_BTP, bias_BNTS, bias_BNTP)
    return attend(q, k, v, masking, Site(inside), 0.7, softcap)


def _value_and_gradients(function: object, case: Case, weight_BTNH: jax.Array) -> tuple:
    def scalar(q, k, v, inside, *biases):
        out = function(Case(q, k, v, inside, case.mask_BTS, case.mask_BTP, *biases))
        # The output of a fully masked query is never used.
        return jnp.sum(jnp.where(sees_BT[..., None, None], out * weight_BTNH, 0))

    sees_BT = case.mask_BTS.any(-1)
    if case.inside is not None:
        sees_BT |= True if case.mask_BTP is None else case.mask_BTP.any(-1)
    return jax.value_and_grad(scalar, argnums=(0, 1, 2, 3, 4, 5))(*case[:4], *case[6:])


@functools.partial(jax.jit, static_argnums=2)
def both(case: Case, weight_BTNH: jax.Array, softcap: float | None = None) -> tuple:
    return (
        _value_and_gradients(lambda case: ours(case, softcap), case, weight_BTNH),
        _value_and_gradients(lambda case: reference(case, 0.7, softcap), case, weight_BTNH),
    )


@settings(max_examples=6)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 6),
    S=st.integers(1, 6),
    K=st.integers(1, 3),
    G=st.integers(1, 3),
    H=st.sampled_from([2, 4]),
    P=st.integers(0, 4),
    bias=st.booleans(),
    window=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_match_one_softmax(**sizes):
    _compare(make(**sizes))


@pytest.mark.parametrize(
    ("softcap", "relative", "bias"),
    [(0.8, "none", True), (None, "shared", True), (None, "own", False), (0.8, "own", True)],
)
def test_values_and_gradients_match_with_soft_cap_and_bias(softcap, relative, bias):
    """A bias is added after the cap; a single row is shared, and its gradients are summed."""
    _compare(make(relative=relative, bias=bias), softcap)


def _compare(case: Case, softcap: float | None = None) -> None:
    weight_BTNH = jnp.asarray(np.random.default_rng(1).normal(size=case.q_BTNH.shape), jnp.float32)
    ours_, plain = both(case, weight_BTNH, softcap)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours_, plain)


def test_bias_of_minus_infinity_removes_a_slot():
    case = make(P=3, window=False)
    without = KVPrefix(*(x[jnp.array([0, 2])] for x in jax.tree.leaves(case.inside)))
    bias = case.inside.bias_LPN.at[1].set(-jnp.inf)
    masked = case._replace(inside=case.inside.replace(bias_LPN=bias))
    np.testing.assert_allclose(
        ours(masked), ours(case._replace(inside=without)), rtol=1e-5, atol=1e-6
    )
    (_, grads), _ = both(masked, jnp.ones_like(case.q_BTNH))
    for leaf in jax.tree.leaves(grads):
        assert jnp.isfinite(leaf).all()
    for leaf in jax.tree.leaves(grads[3]):
        assert (leaf[1] == 0).all()


def test_bias_of_minus_infinity_can_hide_a_slot_from_one_head():
    case = make(P=1, K=2, G=2, window=False)
    hidden = case.inside.bias_LPN.at[0, 3].set(-jnp.inf)
    bare = ours(case._replace(inside=None))
    out = ours(case._replace(inside=case.inside.replace(bias_LPN=hidden)))
    sees = np.asarray(case.mask_BTS.any(-1))
    np.testing.assert_allclose(out[:, :, 3][sees], bare[:, :, 3][sees], rtol=1e-5, atol=1e-6)
    assert jnp.abs(out[:, :, 2] - bare[:, :, 2]).max() > 1e-3


@pytest.mark.parametrize("P", [0, 3])
def test_fully_masked_query_is_finite_and_has_no_gradient(P):
    case = make(B=1, T=1, P=P)
    assert not case.mask_BTS.any()
    assert jnp.isfinite(ours(case)).all()
    (_, grads), _ = both(case, jnp.ones_like(case.q_BTNH))
    for leaf in jax.tree.leaves(grads):
        assert (leaf == 0).all()


def test_padding_does_not_change_gradients():
    """Rows are independent: a fully masked row adds nothing to the gradient of the prefix."""
    case = make(B=2, T=3, S=3)
    padded = case._replace(
        mask_BTS=case.mask_BTS.at[1].set(False), mask_BTP=case.mask_BTP.at[1].set(False)
    )
    alone = Case(*(jax.tree.map(lambda x: x[:1], part) for part in padded[:3]), case.inside, *(
        mask[:1] for mask in padded[4:6]
    ))  # fmt: skip
    (_, grads), _ = both(padded, jnp.ones_like(padded.q_BTNH))
    (_, expected), _ = both(alone, jnp.ones_like(alone.q_BTNH))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads[3], expected[3]
    )


def test_bfloat16_accumulates_in_float32():
    case = make(B=2, T=16, S=64, K=2, G=2, H=16, P=8)
    # Both round the inputs once; the softmax itself must not add to the error.
    low = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(jnp.bfloat16), case)
    high = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(jnp.float32), low)
    (_, grads), _ = both(low, jnp.ones_like(low.q_BTNH))
    _, (_, expected) = both(high, jnp.ones_like(high.q_BTNH))
    assert ours(low).dtype == jnp.bfloat16
    np.testing.assert_allclose(
        ours(low).astype(jnp.float32)[:, 1:], reference(high, 0.7)[:, 1:], rtol=0.02, atol=0.02
    )
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert got.dtype == jnp.bfloat16
        error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
        assert error < 0.02


def test_float32_prefix_has_float32_gradients_in_a_bfloat16_model():
    case = make()
    low = case._replace(
        **{
            name: getattr(case, name).astype(jnp.bfloat16)
            for name in ("q_BTNH", "k_BSKH", "v_BSKH")
        }
    )
    grads = jax.grad(lambda inside: ours(low._replace(inside=inside)).astype(jnp.float32).sum())(
        case.inside
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_large_logits_do_not_overflow():
    case = make(window=False)
    hot = case._replace(q_BTNH=case.q_BTNH * 1e4)
    (value, grads), _ = both(hot, jnp.ones_like(hot.q_BTNH))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((value, grads)))


def test_soft_cap_bounds_the_logits():
    """Far beyond the cap, all causal_mask keys of the same sign have nearly the same weight."""
    case = make(P=0, bias=False)
    hot = case._replace(q_BTNH=case.q_BTNH * 1e4)
    capped = ours(hot, 1e-4)
    mean = case.mask_BTS[..., None, None] * case.v_BSKH[:, None]
    mean_BTKH = mean.sum(2) / jnp.maximum(case.mask_BTS.sum(-1), 1)[..., None, None]
    sees = np.asarray(case.mask_BTS.any(-1))
    expected = jnp.repeat(mean_BTKH, 2, axis=2)
    np.testing.assert_allclose(capped[sees], expected[sees], atol=1e-3)
    assert jnp.abs(ours(hot) - capped)[sees].max() > 0.1


# Terms outside the softmax.


def _add(case: Case, added: Outside | None) -> jax.Array:
    masking = MaskAndBias(case.mask_BTS)
    return attend(case.q_BTNH, case.k_BSKH, case.v_BSKH, masking, Site(outside=added), 0.7)


def _gated(case: Case, added: Gated) -> jax.Array:
    """A softmax over only the adapter, times the gate of its query head (Zhang et al. 2023)."""
    group = case.q_BTNH.shape[2] // added.k_LPKH.shape[1]
    k_PNH, v_PNH = (jnp.repeat(x, group, axis=1) for x in (added.k_LPKH, added.v_LPKH))
    weights = jax.nn.softmax(jnp.einsum("BTNH,PNH->BNTP", case.q_BTNH, k_PNH) * 0.7, axis=-1)
    return jnp.einsum("BNTP,PNH,N->BTNH", weights, v_PNH, added.gate_LN)


def _memory(case: Case, added: Memory) -> jax.Array:
    """elu(query) times the matrix of its head (Wang et al. 2025)."""
    q = case.q_BTNH
    return jnp.einsum("BTNH,NHY->BTNY", jnp.where(q > 0, q, jnp.expm1(q)), added.m_LNHH)


def _added(kind: str) -> Outside:
    normal = functools.partial(jax.random.normal, jax.random.key(7))
    if kind == "memory":
        return Memory(normal((4, 4, 4)))
    k_PKH, v_PKH = normal((2, 3, 2, 4))
    return Gated(k_PKH, v_PKH, normal((4,)))


@pytest.mark.parametrize(("kind", "plain"), [("gated", _gated), ("memory", _memory)])
def test_terms_outside_the_softmax_are_added(kind, plain):
    case = make(P=0)
    weight_BTNH = jnp.asarray(np.random.default_rng(1).normal(size=case.q_BTNH.shape), jnp.float32)

    def value_and_gradients(out):
        def scalar(q_BTNH, added):
            return jnp.sum(weight_BTNH * out(case._replace(q_BTNH=q_BTNH), added))

        return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1)))(case.q_BTNH, _added(kind))

    actual = value_and_gradients(_add)
    expected = value_and_gradients(lambda case, added: _add(case, None) + plain(case, added))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), actual, expected
    )


def test_closed_gate_adds_nothing_and_only_the_gate_has_a_gradient():
    """LLaMA-Adapter starts at zero: from the bare model, with a gradient only for the gate."""
    case = make(P=0)
    closed = _added("gated").replace(gate_LN=jnp.zeros(4))
    np.testing.assert_array_equal(_add(case, closed), _add(case, None))
    grads = jax.grad(lambda added: _add(case, added).sum())(closed)
    assert not grads.k_LPKH.any()
    assert not grads.v_LPKH.any()
    assert grads.gate_LN.all()


@pytest.mark.parametrize("kind", ["gated", "memory"])
def test_bfloat16_model_keeps_its_dtype_with_float32_parameters(kind):
    case = make(P=0)
    low = case._replace(**{
        name: getattr(case, name).astype(jnp.bfloat16) for name in ("q_BTNH", "k_BSKH", "v_BSKH")
    })  # fmt: skip
    assert _add(low, _added(kind)).dtype == jnp.bfloat16
    grads = jax.grad(lambda added: _add(low, added).astype(jnp.float32).sum())(_added(kind))
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
