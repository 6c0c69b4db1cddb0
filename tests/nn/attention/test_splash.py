"""The kernels match XLA, in values and gradients.

Pallas interprets them here; `tests/backbones/test_stack.py` compiles them for a TPU.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.mesh import make_mesh
from prefix_jax.nn.attention import splash, splash_run
from prefix_jax.nn.attention.attend import attend
from prefix_jax.nn.attention.mask import AttentionMask, MaskAndBias, TokenLayout, causal_mask
from prefix_jax.nn.attention.splash_run import interpreted
from prefix_jax.nn.attention.zigzag import original_columns
from prefix_jax.prefix import KVPrefix, Site

pytestmark = pytest.mark.usefixtures("small_blocks")

B, T, K, G, H = 2, 256, 2, 2, 8
# The token arrays of a case.
TOKENS = ("q_BTNH", "k_BSKH", "v_BSKH")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several blocks."""
    monkeypatch.setattr(splash_run, "BLOCK", 128)


class Case(NamedTuple):
    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    inside: KVPrefix | None


def case(S: int = T, P: int = 3, columns: int = T, rows: int = B) -> Case:
    normal = functools.partial(np.random.default_rng(0).normal)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(normal(size=shape), jnp.float32)

    inside = KVPrefix(array(P, K, H), array(P, K, H), array(P, K * G)) if P else None
    return Case(array(rows, columns, K * G, H), array(rows, S, K, H), array(rows, S, K, H), inside)


def packed(columns: int, branches: int = 0, rows: int = B) -> TokenLayout:
    """Rows of segments of various lengths, each a source with `branches` targets, then padding."""
    rng = np.random.default_rng(columns)
    segment, branch, position = np.zeros((3, rows, columns), np.int32)
    for row in range(rows):
        start, number = 0, 1
        while start < columns - 40:
            source = end = start + int(rng.integers(10, 30))
            position[row, start:end] = np.arange(end - start)
            for b in range(1, branches + 1):
                target, end = end, end + int(rng.integers(1, 12))
                branch[row, target:end] = b
                position[row, target:end] = source - start + np.arange(end - target)
            segment[row, start:end] = number
            # Columns beyond the end of the row were cut off.
            start, number = end, number + 1
    arrays = map(jnp.asarray, (segment, branch, position))
    tokens = TokenLayout(*arrays)
    return tokens if branches else dataclasses.replace(tokens, branch_BT=None)


def weights(case: Case) -> jax.Array:
    """Weights of each query's output in the sum."""
    return jnp.asarray(np.random.default_rng(1).normal(size=case.q_BTNH.shape), jnp.float32)


def outputs_and_gradients(
    case: Case,
    masking: MaskAndBias,
    softcap: float | None = None,
    fused: bool = True,
    weight_BTNH: jax.Array | None = None,
) -> tuple[jax.Array, Case]:
    """Outputs of queries that are not padding, and the gradients of their weighted sum."""
    weight_BTNH = weights(case) if weight_BTNH is None else weight_BTNH
    assert isinstance(masking.mask, AttentionMask)
    real_BT11 = (masking.mask.queries.segment_BT > 0)[..., None, None]

    def scalar(case: Case) -> tuple[jax.Array, jax.Array]:
        out = attend(*case[:3], masking, Site(case.inside), 0.5, softcap)
        out = jnp.where(real_BT11, out, 0)
        return jnp.sum(out * weight_BTNH), out

    def both(case: Case) -> tuple[jax.Array, Case]:
        (_, out), gradients = jax.value_and_grad(scalar, has_aux=True)(case)
        return out, gradients

    if not fused:
        return jax.jit(both)(case)
    with interpreted():
        program = jax.jit(both).trace(case)
    # Forward, and backward for queries and for keys.
    assert str(program.jaxpr).count("pallas_call[") >= 3
    return program.lower().compile()(case)


def compare(case: Case, masking: MaskAndBias, softcap: float | None = None) -> None:
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        outputs_and_gradients(case, masking, softcap),
        outputs_and_gradients(case, masking, softcap, fused=False),
    )


def test_packed_rows_with_prefix_bias_and_soft_cap():
    tokens = packed(T)
    compare(case(), MaskAndBias(AttentionMask(tokens, tokens)), softcap=2.0)


def test_rows_that_are_not_a_multiple_of_the_block():
    tokens = packed(200)
    compare(case(S=200, P=0, columns=200), MaskAndBias(AttentionMask(tokens, tokens)))


def test_branched_targets():
    tokens = packed(T, branches=3)
    compare(case(), MaskAndBias(AttentionMask(tokens, tokens)))


@pytest.mark.parametrize("narrow", [True, False])
def test_windows_that_differ_between_layers(narrow: bool):
    """A prefix also leaves the window."""
    tokens = packed(T)
    mask = AttentionMask(tokens, tokens, window=9, narrow=jnp.asarray(narrow))
    mask_BTP = jnp.broadcast_to((tokens.position_BT < 9)[..., None], (B, T, 3))
    compare(case(), MaskAndBias(mask, mask_BTP))


def test_encoder_and_cross_attention():
    compare(case(S=384), MaskAndBias(AttentionMask(packed(T), packed(384), causal=False)))


@pytest.mark.parametrize(("sizes", "rows"), [((2, 1, 4), 2), ((4, 1, 2), 2)])
def test_devices_share_rows_and_heads(sizes: tuple[int, int, int], rows: int):
    """With 2 key heads on 4 devices, two devices hold each key head, with one of its query heads.
    2 rows on 4 devices are replicated."""
    inputs, tokens = case(S=128, columns=128, rows=rows), packed(128, rows=rows)
    masking = MaskAndBias(AttentionMask(tokens, tokens))
    plain = outputs_and_gradients(inputs, masking, fused=False)
    with jax.set_mesh(make_mesh(*sizes)):
        split = outputs_and_gradients(inputs, masking)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), split, plain)


def packed_with(kind: str, columns: int) -> AttentionMask:
    tokens = packed(columns, branches=3 if kind == "branches" else 0)
    return AttentionMask(tokens, tokens, window=9 if kind == "window" else None)


@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize(
    ("kind", "columns", "sequence", "tensor"),
    [
        ("plain", 256, 4, 2),
        # Shares that are not a multiple of the block.
        ("plain", 192, 2, 2),
        # Copies of the 2 key heads.
        ("plain", 256, 2, 4),
        ("branches", 256, 2, 2),
        ("window", 512, 2, 2),
    ],
)
def test_devices_share_columns(kind: str, columns: int, sequence: int, tensor: int, zigzag: bool):
    """In order, or each with columns from both ends of a row."""
    mask, inputs = packed_with(kind, columns), case(S=columns, columns=columns)
    plain = outputs_and_gradients(inputs, MaskAndBias(mask), fused=False)
    order = original_columns(columns, sequence) if zigzag else np.arange(columns)

    def laid(tree: Any, order: np.ndarray = order) -> Any:
        return jax.tree.map(lambda x: x[:, order], tree)

    split_inputs = inputs._replace(**laid({name: getattr(inputs, name) for name in TOKENS}))
    split_symbolic = dataclasses.replace(laid(mask), zigzag=zigzag)
    weight_BTNH = laid(weights(inputs))
    with jax.set_mesh(make_mesh(-1, 1, tensor, sequence=sequence)):
        out, gradients = outputs_and_gradients(
            split_inputs, MaskAndBias(split_symbolic), weight_BTNH=weight_BTNH
        )
    there = laid({name: getattr(gradients, name) for name in TOKENS}, np.argsort(order))
    again = laid(out, np.argsort(order)), gradients._replace(**there)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), again, plain)


@pytest.mark.parametrize("S", [384, 129])
def test_devices_share_columns_in_cross_attention(S: int):
    """They also share the keys, if their number divides them."""
    inputs, masking = case(S=S), MaskAndBias(AttentionMask(packed(T), packed(S), causal=False))
    plain = outputs_and_gradients(inputs, masking, fused=False)
    with jax.set_mesh(make_mesh(2, sequence=4)):
        split = outputs_and_gradients(inputs, masking)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), split, plain)


def test_fully_masked_query_is_finite_and_has_no_gradient():
    nobody = TokenLayout.plain(jnp.zeros((1, 128), bool))
    masking = MaskAndBias(AttentionMask(nobody, nobody))

    @jax.jit
    def pulled(case: Case) -> tuple[jax.Array, Case]:
        out, pull = jax.vjp(lambda case: attend(*case[:3], masking, None, 0.5), case)
        return out, *pull(jnp.ones_like(out))

    with interpreted():
        out, gradients = pulled(case(P=0, S=128, columns=128, rows=1))
    assert jnp.isfinite(out).all()
    for leaf in jax.tree.leaves(gradients):
        assert not leaf.any()


def test_unsupported_cases_use_xla():
    tokens, branched = packed(T), packed(T, branches=2)
    short = packed(100)
    q, k = jnp.zeros((B, K, G, T, H)), jnp.zeros((B, T, K, H))

    def fits(masking: MaskAndBias, q: jax.Array = q, k: jax.Array = k) -> bool:
        with jax.set_mesh(make_mesh()):
            return splash.fits(q, k, masking)

    rule = MaskAndBias(AttentionMask(tokens, tokens))
    # 8 devices without a mesh: the program may span any number of them.
    assert not splash.fits(q, k, rule)
    assert fits(rule)
    assert fits(MaskAndBias(AttentionMask(branched, branched)))
    assert not fits(MaskAndBias(causal_mask(tokens, tokens)))
    assert not fits(dataclasses.replace(rule, bias_BNTS=jnp.zeros((1, K * G, T, T))))
    assert not fits(MaskAndBias(AttentionMask(branched, branched, window=9)))
    assert not fits(MaskAndBias(AttentionMask(short, short)), q[:, :, :, :100], k[:, :100])
    # A cache with room for more.
    assert not fits(MaskAndBias(AttentionMask(packed(128), tokens)), q[:, :, :, :128])
