"""P-tuning's prompt encoders: an MLP, and a bidirectional LSTM."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.methods.base import normal
from prefix_jax.methods.ptuning import PTuning
from prefix_jax.prefix import Embeds, Geometry, SiteShape

G = Geometry(d_model=12, vocab=50, decoder=SiteShape(2, 4, 2, 8))
P, KEY = 5, jax.random.key(0)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def by_hand(params, x_PD: np.ndarray, reverse: bool) -> np.ndarray:
    """One direction of an LSTM, gate by gate."""
    width = params["state_X4X"].shape[0]
    state, cell, out = np.zeros(width), np.zeros(width), np.zeros((len(x_PD), width))
    for p in reversed(range(len(x_PD))) if reverse else range(len(x_PD)):
        gates = x_PD[p] @ params["input_Y4X"] + state @ params["state_X4X"]
        gates = gates + params["input_bias_4X"] + params["state_bias_4X"]
        into, forget, new, show = gates.reshape(4, width)
        cell = sigmoid(forget) * cell + sigmoid(into) * np.tanh(new)
        state = out[p] = sigmoid(show) * np.tanh(cell)
    return out


def test_lstm_reads_slots_in_both_directions():
    method = PTuning(P, encoder="lstm", hidden=6, lstm_layers=2)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), method.init(KEY, G, None))
    x_PX = params["embedding_PD"]
    for layer in params["lstm"].values():
        directions = (
            by_hand(layer["forward"], x_PX, False),
            by_hand(layer["backward"], x_PX, True),
        )
        x_PX = np.concatenate(directions, axis=1)
    first, second = params["linear"]["0"], params["linear"]["1"]
    x_PX = np.maximum(x_PX @ first["weight_XY"] + first["bias_Y"], 0)
    expected = x_PX @ second["weight_XY"] + second["bias_Y"]
    produced = method(method.init(KEY, G, None)).x_PD
    np.testing.assert_allclose(produced, expected, rtol=1e-5, atol=1e-6)


def test_mlp_has_three_layers_and_two_relus():
    method = PTuning(P, hidden=7)
    params = method.init(KEY, G, None)
    first, second, third = (params["linear"][str(number)] for number in range(3))
    x = np.maximum(params["embedding_PD"] @ first["weight_XY"] + first["bias_Y"], 0)
    x = np.maximum(x @ second["weight_XY"] + second["bias_Y"], 0)
    expected = x @ third["weight_XY"] + third["bias_Y"]
    np.testing.assert_allclose(method(params).x_PD, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_width_defaults_to_the_embedding_width(encoder):
    params = PTuning(P, encoder=encoder).init(KEY, G, None)
    width = params["linear"]["0"]["weight_XY"].shape[1]
    assert width == (12 if encoder == "mlp" else 24)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_every_parameter_receives_a_gradient(encoder):
    method = PTuning(P, encoder=encoder, hidden=8)
    params = method.init(KEY, G, normal(Embeds, G, P, KEY, std=1.0))
    grads = jax.grad(lambda params: jnp.sum(method(params).x_PD ** 2))(params)
    assert all(leaf.any() for leaf in jax.tree.leaves(grads))


def test_dropout_applies_between_lstm_layers():
    wet = PTuning(P, encoder="lstm", hidden=6, lstm_dropout=0.5)
    params = wet.init(KEY, G, None)
    assert wet.draws
    assert (wet(params, KEY).x_PD != wet(params).x_PD).any()
    np.testing.assert_array_equal(wet(params, KEY).x_PD, wet(params, KEY).x_PD)
    alone = PTuning(P, encoder="lstm", hidden=6, lstm_dropout=0.5, lstm_layers=1)
    params = alone.init(KEY, G, None)
    np.testing.assert_array_equal(alone(params, KEY).x_PD, alone(params).x_PD)
    assert not PTuning(P, lstm_dropout=0.5).draws
