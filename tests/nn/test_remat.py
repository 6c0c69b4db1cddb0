"""Recomputation under each policy, counted in the compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from prefix_jax.nn.remat import Remat
from prefix_jax.plan.hlo import parse
from prefix_jax.plan.products import products
from prefix_jax.prefix import Hidden
from tests.decoders import decoder, present, weights

B, T, P = 2, 20, 3
NH, KH, D, F, L = 4 * 8, 2 * 8, 32, 48, 3
TOKEN = 2 * B * T * L  # per element of a layer's matrices: a multiply-add counts as two


def flops(remat: Remat) -> int:
    """Operations for the gradient of a prefix with the Llama of `decoders`."""
    backbone = decoder("llama", remat)

    def loss(prefix, params, ids_BT, tokens):
        h_BTD, _ = backbone.hidden(params, ids_BT, tokens, backbone.lift(params, prefix))
        return jnp.sum(jnp.sin(h_BTD))

    prefix = Hidden(jax.ShapeDtypeStruct((L, P, D), jnp.float32))
    params = jax.eval_shape(lambda: weights(backbone))
    ids_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(prefix, params, ids_BT, present(B, T)).compile()
    text = compiled.as_text()
    assert text is not None
    return sum(product.flops for product in products(parse(text)))


@pytest.fixture(scope="module")
def least() -> int:
    return flops("none")


def test_dots_recomputes_no_product(least):
    assert flops("dots") == least


def test_mlp_recomputes_attention(least):
    projections = TOKEN * (D * (NH + 2 * KH) + NH * D)
    # The backward pass always recomputes the logits, so only the weighted sum is added.
    mixing = 2 * B * T * (T + P) * NH * L
    assert flops("mlp") == least + projections + mixing


def test_projections_recomputes_the_gate_and_the_attention_output(least):
    mixing = 2 * B * T * (T + P) * NH * L
    assert flops("projections") == least + TOKEN * D * F + mixing


def test_attention_recomputes_the_feed_forward_except_its_last_product(least):
    assert flops("attention") == least + TOKEN * 2 * D * F


def test_full_recomputes_all_but_the_last_product(least):
    assert flops("full") == flops("mlp") + flops("attention") - least
