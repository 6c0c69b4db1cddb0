"""Prefix-Tuning+ adds elu(q) M to the output of every head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import decoder, hidden, lift, present, token_ids, weights
from encoder_decoders import encoder_decoder, params_of, states

from prefix_jax.methods.base import normal_like
from prefix_jax.methods.plus import PrefixTuningPlus

KEY = jax.random.key(0)
BACKBONE = decoder("llama")
G = BACKBONE.geometry


def test_starts_as_the_bare_model_and_every_matrix_has_a_gradient():
    params, ids, tokens = weights(BACKBONE), token_ids(1, 6), present(1, 6)
    method = PrefixTuningPlus()
    trained = method.init(KEY, G, None)
    prefix = lift(BACKBONE, params, method(trained))
    assert (prefix.length, prefix.text_position, method.resolved_text_position) == (0, 0, 0)
    bare, _ = hidden(BACKBONE, params, ids, tokens, None)
    np.testing.assert_array_equal(hidden(BACKBONE, params, ids, tokens, prefix)[0], bare)

    def loss(trained) -> jax.Array:
        prefix = BACKBONE.lift(params, method(trained))
        return jnp.sum(BACKBONE.hidden(params, ids, tokens, prefix)[0][..., 0] ** 2)

    (grad_LNHH,) = jax.tree.leaves(jax.jit(jax.grad(loss))(trained))
    assert grad_LNHH.shape == (3, 4, 8, 8)
    assert (jnp.abs(grad_LNHH).max((2, 3)) > 0).all()


def test_other_layers_are_unchanged():
    params, ids, tokens = weights(BACKBONE), token_ids(1, 6), present(1, 6)
    some, full = PrefixTuningPlus(layers=(2,)), PrefixTuningPlus()
    start = normal_like(full.blank(G), KEY, 1.0)
    m_LNHH = start.decoder.outside.m_LNHH.at[:2].set(0)
    part = normal_like(some.blank(G), KEY, 1.0)
    part = part.replace(
        decoder=part.decoder.replace(outside=part.decoder.outside.replace(m_LNHH=m_LNHH[2:]))
    )
    whole = start.replace(
        decoder=start.decoder.replace(outside=start.decoder.outside.replace(m_LNHH=m_LNHH))
    )

    def out(method, start) -> jax.Array:
        prefix = lift(BACKBONE, params, method(method.init(KEY, G, start)))
        return hidden(BACKBONE, params, ids, tokens, prefix)[0]

    np.testing.assert_array_equal(out(some, part), out(full, whole))


@pytest.mark.parametrize("site", ["encoder", "decoder", "cross"])
def test_every_attention_of_an_encoder_decoder_accepts_a_memory(site):
    backbone, params = encoder_decoder("t5"), params_of("t5")
    ids, tokens = token_ids(1, 6), present(1, 6)
    method = PrefixTuningPlus(sites=(site,))

    def out(start) -> jax.Array:
        prefix = lift(backbone, params, method(method.init(KEY, backbone.geometry, start)))
        assert set(prefix.sites) == {site}
        return states(backbone, params, ids, tokens, ids, tokens, prefix)

    bare = states(backbone, params, ids, tokens, ids, tokens, None)
    np.testing.assert_array_equal(out(None), bare)
    moved = out(normal_like(method.blank(backbone.geometry), KEY, 1.0))
    assert float(jnp.abs(moved - bare).max()) > 0.01
