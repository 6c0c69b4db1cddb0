"""Zigzag layout of columns over devices and back. `conftest.py` makes 8 devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.mesh import make_mesh
from prefix_jax.nn.attention import zigzag


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_each_device_has_columns_from_both_ends(shards: int):
    order = zigzag.original_columns(48, shards).reshape(shards, -1)
    assert sorted(order.reshape(-1)) == list(range(48))
    # The cost of causal attention: column t sees t + 1 keys.
    assert len(set((order + 1).sum(axis=1))) == 1
    for device in order:
        half = len(device) // 2
        assert (np.diff(device[:half]) == 1).all()
        assert (np.diff(device[half:]) == 1).all()


@pytest.mark.parametrize("shards", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 8])
def test_restore_inverts_permute(shards: int, rows: int):
    x = {"ids": jnp.arange(rows * 48).reshape(rows, 48), "h": jnp.ones((rows, 48, 3)).cumsum(1)}
    with jax.set_mesh(make_mesh(sequence=shards)):
        permuted = jax.jit(zigzag.permute)(x)
        again = jax.jit(zigzag.restore)(permuted)
    for name, leaf in x.items():
        np.testing.assert_array_equal(permuted[name], leaf[:, zigzag.original_columns(48, shards)])
        np.testing.assert_array_equal(again[name], leaf)
        np.testing.assert_array_equal(zigzag.reorder(leaf, shards, 1, back=False), permuted[name])
        np.testing.assert_array_equal(zigzag.reorder(permuted[name], shards, 1, back=True), leaf)


def test_pad_makes_rows_divisible_over_devices():
    x_BT = jnp.ones((2, 13), int)
    with jax.set_mesh(make_mesh(sequence=4)):
        padded = zigzag.pad(x_BT)
        assert zigzag.applies_to(padded.shape[1])
        assert not zigzag.applies_to(12)
    np.testing.assert_array_equal(padded.sum(axis=0), [2] * 13 + [0] * 3)


def test_does_nothing_outside_a_mesh():
    x_BT = jnp.ones((2, 13), int)
    assert zigzag.pad(x_BT) is x_BT
    assert not zigzag.applies_to(16)


def test_gradient_of_permute_is_not_summed_over_other_axes():
    """Replicas along the tensor axis are not summed."""

    def total(x_BT: jax.Array) -> jax.Array:
        return jnp.sum(zigzag.permute(x_BT) ** 2)

    with jax.set_mesh(make_mesh(2, 1, 2, sequence=2)):
        gradient = jax.jit(jax.grad(total))
        x_BT = jnp.arange(16.0).reshape(2, 8)
        np.testing.assert_array_equal(gradient(x_BT), 2 * x_BT)
        assert "all-reduce" not in gradient.lower(x_BT).compile().as_text()
