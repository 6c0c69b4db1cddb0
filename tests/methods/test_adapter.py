"""LLaMA-Adapter: gated attention to trained states, in the top layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import decoder, hidden, lift, present, read, token_ids, weights
from encoder_decoders import encoder_decoder, params_of, states

from prefix_jax.errors import ConfigError
from prefix_jax.methods.adapter import LlamaAdapter
from prefix_jax.methods.base import normal_like
from prefix_jax.model import start_from_ids
from prefix_jax.prefix import Adapter, Geometry, Prefix, SiteShape

G = Geometry(d_model=32, vocab=50, decoder=SiteShape(3, 4, 2, 8))
P, KEY = 5, jax.random.key(0)


@pytest.mark.parametrize(
    ("layers", "expected"), [(2, (1, 2)), (1, (2,)), (3, None), (None, None), ((0, 2), (0, 2))]
)
def test_layers_count_from_the_top_or_are_listed(layers, expected):
    method = LlamaAdapter(P, layers=layers)
    adapter = method(method.init(KEY, G, None))
    assert adapter.layers == expected
    assert len(adapter.h_LPD) == (3 if expected is None else len(expected))


@pytest.mark.parametrize(
    ("layers", "message"),
    [(4, "the top 4 layers; this backbone has 3"), ((3,), "layer 3; this backbone has 0 to 2")],
)
def test_rejects_layers_beyond_the_backbone(layers, message):
    with pytest.raises(ConfigError, match=message):
        LlamaAdapter(P, layers=layers).init(KEY, G, None)


@pytest.mark.parametrize("gate", ["tanh", "plain"])
def test_gates_start_at_zero_and_have_a_gradient(gate):
    backbone = decoder("llama")
    params, ids = weights(backbone), token_ids(1, 6)
    method = LlamaAdapter(P, layers=2, gate=gate)
    trained = method.init(KEY, G, None)
    assert trained["adapter"].gate_LN.shape == (2, 4 if gate == "tanh" else 1)
    assert not method(trained).gate_LN.any()

    def loss(trained) -> jax.Array:
        prefix = backbone.lift(params, method(trained))
        return jnp.sum(backbone.hidden(params, ids, present(1, 6), prefix)[0][..., 0] ** 2)

    grads = jax.jit(jax.grad(loss))(trained)["adapter"]
    assert grads.gate_LN.all()
    # While a gate is closed, its states receive no gradient.
    assert not grads.h_LPD.any()


def test_plain_gate_is_shared_by_all_heads():
    method = LlamaAdapter(P, gate="plain")
    params = method.init(KEY, G, None)
    params = {"adapter": params["adapter"].replace(gate_LN=jnp.array([[1.0], [2.0], [3.0]]))}
    assert method(params).gate_LN.shape == (3, 1)
    backbone = decoder("llama")
    prefix = lift(backbone, weights(backbone), method(params))
    np.testing.assert_array_equal(prefix.decoder.outside.gate_LN, np.tile([[1], [2], [3]], 4))


def test_start_inverts_the_tanh_of_a_gate():
    method = LlamaAdapter(P)
    start = normal_like(method.blank(G), KEY, 1.0)
    gate_LN = jnp.array([[-1.0, -0.9, 0, 1.0]] * 3)
    produced = method(method.init(KEY, G, start.replace(gate_LN=gate_LN)))
    np.testing.assert_allclose(produced.gate_LN, gate_LN, atol=1e-6)


def test_dropout_does_not_affect_gates():
    method = LlamaAdapter(50, dropout=0.5)
    start = Adapter(jnp.ones((3, 50, 32)), jnp.full((3, 4), 0.5))
    dropped = method(method.init(KEY, G, start), KEY)
    assert 0.4 < float((dropped.h_LPD == 0).mean()) < 0.6
    np.testing.assert_allclose(dropped.gate_LN, 0.5, rtol=1e-6)


def test_start_from_text_reproduces_its_keys_and_values_in_every_layer():
    """With learned positions only: an adapter's keys are not rotated."""
    backbone = decoder("gpt2")
    params, ids = weights(backbone), np.asarray(token_ids(P))
    adapter = start_from_ids(backbone, params, Adapter, ids, P)
    gated = lift(backbone, params, adapter).decoder.outside
    prefix = read(backbone, params, jnp.asarray(ids))[2]
    assert isinstance(prefix, Prefix)
    np.testing.assert_allclose(gated.k_LPKH, prefix.decoder.inside.k_LPKH, atol=1e-5)
    np.testing.assert_allclose(gated.v_LPKH, prefix.decoder.inside.v_LPKH, atol=1e-5)
    assert not gated.gate_LN.any()


def test_does_not_shift_text_positions():
    backbone = decoder("gpt2")
    params, ids, tokens = weights(backbone), token_ids(1, 6), present(1, 6)
    method = LlamaAdapter(P)
    assert method.resolved_text_position == 0
    prefix = lift(backbone, params, method(method.init(KEY, backbone.geometry, None)))
    assert (prefix.text_position, prefix.text_position_in("decoder")) == (0, 0)
    bare, _ = hidden(backbone, params, ids, tokens, None)
    np.testing.assert_array_equal(hidden(backbone, params, ids, tokens, prefix)[0], bare)


def test_adapts_the_decoder_of_an_encoder_decoder():
    backbone, params = encoder_decoder("t5"), params_of("t5")
    ids, tokens = token_ids(1, 6), present(1, 6)
    method = LlamaAdapter(P, layers=2)

    def out(trained) -> jax.Array:
        prefix = lift(backbone, params, method(trained))
        assert set(prefix.sites) == {"decoder"}
        return states(backbone, params, ids, tokens, ids, tokens, prefix)

    trained = method.init(KEY, backbone.geometry, None)
    bare = states(backbone, params, ids, tokens, ids, tokens, None)
    np.testing.assert_array_equal(out(trained), bare)
    opened = {"adapter": trained["adapter"].replace(gate_LN=jnp.ones((2, 4)))}
    assert float(jnp.abs(out(opened) - bare).max()) > 0.01
