"""Attention equals a plain softmax over prefix and tokens, in values and in gradients."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_jax.nn.attend import attend
from prefix_jax.nn.mask import Seen
from prefix_jax.prefix import KVPrefix, Site

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Case(NamedTuple):
    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    join: KVPrefix | None
    mask_BTS: jax.Array
    mask_BTP: jax.Array | None


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
    seed: int = 0,
) -> Case:
    """Random arrays; query 0 of row 0 sees nothing at all, like padding behind a window."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    mask_BTS = rng.random((B, T, S)) < 0.6
    mask_BTP = rng.random((B, T, P)) < 0.6
    mask_BTS[..., 0] = True
    mask_BTS[0, 0], mask_BTP[0, 0] = False, False
    join = None
    if P:
        join = KVPrefix(normal(P, K, H), normal(P, K, H), normal(P, K * G) if bias else None)
    return Case(
        normal(B, T, K * G, H),
        normal(B, S, K, H),
        normal(B, S, K, H),
        join,
        jnp.asarray(mask_BTS),
        jnp.asarray(mask_BTP) if P and window else None,
    )


def reference(case: Case, scale: float) -> jax.Array:
    """One softmax over keys that were concatenated and repeated for each query head."""
    q, k, v, join, mask_BTS, mask_BTP = case
    B, T, N, _ = q.shape
    bias_BNTS = jnp.where(mask_BTS, 0.0, -1e30)[:, None] * jnp.ones((1, N, 1, 1))
    if join is not None:
        P = join.length
        k, v = (
            jnp.concatenate([jnp.broadcast_to(ours, (B, *ours.shape)), theirs], axis=1)
            for ours, theirs in ((join.k_LPKH, k), (join.v_LPKH, v))
        )
        bias_BNTP = jnp.zeros((B, N, T, P))
        if join.bias_LPN is not None:
            bias_BNTP += jnp.maximum(join.bias_LPN.T, -1e30)[None, :, None]
        if mask_BTP is not None:
            bias_BNTP = jnp.where(mask_BTP[:, None], bias_BNTP, -1e30)
        bias_BNTS = jnp.concatenate([bias_BNTP, bias_BNTS], axis=-1)
    group = N // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    logits_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q, k) * scale + bias_BNTS
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(logits_BNTS, axis=-1), v)


@jax.jit
def ours(case: Case) -> jax.Array:
    seen = Seen(case.mask_BTS, case.mask_BTP)
    return attend(case.q_BTNH, case.k_BSKH, case.v_BSKH, seen, Site(case.join), 0.7)


def _value_and_gradients(function: object, case: Case, weight_BTNH: jax.Array) -> tuple:
    def scalar(q, k, v, join):
        out = function(Case(q, k, v, join, case.mask_BTS, case.mask_BTP))
        # Nobody reads what a query that sees nothing finds.
        return jnp.sum(jnp.where(sees_BT[..., None, None], out * weight_BTNH, 0))

    sees_BT = case.mask_BTS.any(-1)
    if case.join is not None:
        sees_BT |= True if case.mask_BTP is None else case.mask_BTP.any(-1)
    return jax.value_and_grad(scalar, argnums=(0, 1, 2, 3))(*case[:4])


@jax.jit
def both(case: Case, weight_BTNH: jax.Array) -> tuple:
    return (
        _value_and_gradients(ours, case, weight_BTNH),
        _value_and_gradients(lambda case: reference(case, 0.7), case, weight_BTNH),
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
def test_values_and_gradients_are_those_of_one_softmax(**sizes):
    case = make(**sizes)
    weight_BTNH = jnp.asarray(np.random.default_rng(1).normal(size=case.q_BTNH.shape), jnp.float32)
    ours_, plain = both(case, weight_BTNH)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours_, plain)


def test_a_bias_of_minus_infinity_makes_a_slot_absent():
    case = make(P=3, window=False)
    without = KVPrefix(*(x[jnp.array([0, 2])] for x in jax.tree.leaves(case.join)))
    bias = case.join.bias_LPN.at[1].set(-jnp.inf)
    masked = case._replace(join=case.join.replace(bias_LPN=bias))
    np.testing.assert_allclose(
        ours(masked), ours(case._replace(join=without)), rtol=1e-5, atol=1e-6
    )
    (_, grads), _ = both(masked, jnp.ones_like(case.q_BTNH))
    for leaf in jax.tree.leaves(grads):
        assert jnp.isfinite(leaf).all()
    for leaf in jax.tree.leaves(grads[3]):
        assert (leaf[1] == 0).all()


def test_a_bias_of_minus_infinity_may_hide_a_slot_from_one_head_alone():
    case = make(P=1, K=2, G=2, window=False)
    hidden = case.join.bias_LPN.at[0, 3].set(-jnp.inf)
    bare = ours(case._replace(join=None))
    out = ours(case._replace(join=case.join.replace(bias_LPN=hidden)))
    sees = np.asarray(case.mask_BTS.any(-1))
    np.testing.assert_allclose(out[:, :, 3][sees], bare[:, :, 3][sees], rtol=1e-5, atol=1e-6)
    assert jnp.abs(out[:, :, 2] - bare[:, :, 2]).max() > 1e-3


@pytest.mark.parametrize("P", [0, 3])
def test_a_query_that_sees_nothing_stays_finite_and_sends_no_gradient(P):
    case = make(B=1, T=1, P=P)
    assert not case.mask_BTS.any()
    assert jnp.isfinite(ours(case)).all()
    (_, grads), _ = both(case, jnp.ones_like(case.q_BTNH))
    for leaf in jax.tree.leaves(grads):
        assert (leaf == 0).all()


def test_padding_changes_no_gradient():
    """The rows of one batch do not mix: a row that sees nothing adds nothing to the prefix."""
    case = make(B=2, T=3, S=3)
    padded = case._replace(
        mask_BTS=case.mask_BTS.at[1].set(False), mask_BTP=case.mask_BTP.at[1].set(False)
    )
    alone = Case(*(jax.tree.map(lambda x: x[:1], part) for part in padded[:3]), case.join, *(
        mask[:1] for mask in padded[4:]
    ))  # fmt: skip
    (_, grads), _ = both(padded, jnp.ones_like(padded.q_BTNH))
    (_, expected), _ = both(alone, jnp.ones_like(alone.q_BTNH))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads[3], expected[3]
    )


def test_bfloat16_accumulates_in_float32():
    case = make(B=2, T=16, S=64, K=2, G=2, H=16, P=8)
    # One rounding of the inputs is common to both; the softmax itself must not add to it.
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


def test_a_float32_prefix_gets_float32_gradients_from_a_bfloat16_model():
    case = make()
    low = case._replace(
        **{
            name: getattr(case, name).astype(jnp.bfloat16)
            for name in ("q_BTNH", "k_BSKH", "v_BSKH")
        }
    )
    grads = jax.grad(lambda join: ours(low._replace(join=join)).astype(jnp.float32).sum())(
        case.join
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_large_logits_do_not_overflow():
    case = make(window=False)
    hot = case._replace(q_BTNH=case.q_BTNH * 1e4)
    (value, grads), _ = both(hot, jnp.ones_like(hot.q_BTNH))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((value, grads)))
