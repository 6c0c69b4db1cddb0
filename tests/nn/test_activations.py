"""Activations match those of the same name in transformers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.errors import BackboneError
from prefix_jax.nn.activations import _ACTIVATIONS, activation

INPUTS = [-12.0, -2.0, -0.5, 0.0, 1.0, 12.0]
# transformers.activations.ACT2FN[name](INPUTS), of transformers 5.23.
EXPECTED = {
    "silu": [-7.373e-05, -0.23841, -0.18877, 0.0, 0.73106, 12.0],
    "swish": [-7.373e-05, -0.23841, -0.18877, 0.0, 0.73106, 12.0],
    "relu": [0.0, 0.0, 0.0, 0.0, 1.0, 12.0],
    "tanh": [-1.0, -0.96403, -0.46212, 0.0, 0.76159, 1.0],
    "sigmoid": [6.1442e-06, 0.1192, 0.37754, 0.5, 0.73106, 0.99999],
    "linear": [-12.0, -2.0, -0.5, 0.0, 1.0, 12.0],
    "relu2": [0.0, 0.0, 0.0, 0.0, 1.0, 144.0],
    "relu6": [0.0, 0.0, 0.0, 0.0, 1.0, 6.0],
    "leaky_relu": [-0.12, -0.02, -0.005, 0.0, 1.0, 12.0],
    "mish": [-7.373e-05, -0.2525, -0.22074, 0.0, 0.8651, 12.0],
    "laplace": [0.0, 0.0, 9.3877e-06, 0.0060945, 0.85043, 1.0],
    "gelu": [-0.0, -0.0455, -0.15427, 0.0, 0.84134, 12.0],
    "gelu_python": [-0.0, -0.0455, -0.15427, 0.0, 0.84134, 12.0],
    "gelu_10": [-0.0, -0.0455, -0.15427, 0.0, 0.84134, 10.0],
    "quick_gelu": [-1.6186e-08, -0.064341, -0.14961, 0.0, 0.8458, 12.0],
    "gelu_new": [-0.0, -0.045402, -0.15429, 0.0, 0.84119, 12.0],
    "gelu_fast": [-0.0, -0.045402, -0.15429, 0.0, 0.84119, 12.0],
    "gelu_accurate": [-0.0, -0.045402, -0.15429, 0.0, 0.84119, 12.0],
    "gelu_python_tanh": [-0.0, -0.045402, -0.15429, 0.0, 0.84119, 12.0],
    "gelu_pytorch_tanh": [-0.0, -0.045402, -0.15429, 0.0, 0.84119, 12.0],
}


def test_activations_have_expected_values() -> None:
    assert EXPECTED.keys() == _ACTIVATIONS.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_activations_match_transformers(name: str) -> None:
    values = activation(name)(jnp.asarray(INPUTS))
    np.testing.assert_allclose(values, EXPECTED[name], rtol=1e-4, atol=1e-6)


def test_unknown_activation_lists_the_known_ones() -> None:
    with pytest.raises(BackboneError, match="unknown activation 'prelu'; known: silu, "):
        activation("prelu")
