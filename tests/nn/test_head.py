"""Tests the initial values and the dropout of heads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.nn.head import Head

D = 8
RNG = jax.random.key(0)


def test_weights_start_small_and_biases_at_zero() -> None:
    params = Head(3, activation="tanh").init(RNG, 400)
    assert {name: x.shape for name, x in params.items()} == {
        "dense_DE": (400, 400),
        "dense_bias_E": (400,),
        "out_DY": (400, 3),
        "out_bias_Y": (3,),
    }
    assert float(params["dense_DE"].std()) == pytest.approx(0.02, rel=0.02)
    assert not params["dense_bias_E"].any()
    assert not params["out_bias_Y"].any()


def test_dropout_applies_only_in_training_and_keeps_the_mean() -> None:
    head = Head(2, dropout=0.5)
    params = {"out_DY": jnp.ones((D, 2)), "out_bias_Y": jnp.zeros(2)}
    h_BMD = jnp.ones((1, 2000, D))
    np.testing.assert_array_equal(head(params, h_BMD), D)
    dropped = head(params, h_BMD, RNG)
    assert float(dropped.mean()) == pytest.approx(D, rel=0.02)
    assert len(np.unique(dropped)) > 3
    still = dataclasses.replace(head, dropout=0.0)
    np.testing.assert_array_equal(still(params, h_BMD, RNG), D)
