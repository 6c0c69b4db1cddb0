"""Zigzag layout of columns over devices and back. `conftest.py` makes 8 devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.mesh import make_mesh
from prefix_jax.nn import columns


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_each_device_has_columns_from_both_ends(shards: int):
    order = columns.origin(48, shards).reshape(shards, -1)
    assert sorted(order.reshape(-1)) == list(range(48))
    # The cost of causal attention: column t sees t + 1 keys.
    assert len(set((order + 1).sum(axis=1))) == 1
    for device in order:
        half = len(device) // 2
        assert (np.diff(device[:half]) == 1).all()
        assert (np.diff(device[half:]) == 1).all()


@pytest.mark.parametrize("shards", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 8])
def test_undeal_inverts_deal(shards: int, rows: int):
    x = {"ids": jnp.arange(rows * 48).reshape(rows, 48), "h": jnp.ones((rows, 48, 3)).cumsum(1)}
    with jax.set_mesh(make_mesh(sequence=shards)):
        dealt = jax.jit(columns.deal)(x)
        again = jax.jit(columns.undeal)(dealt)
    for name, leaf in x.items():
        np.testing.assert_array_equal(dealt[name], leaf[:, columns.origin(48, shards)])
        np.testing.assert_array_equal(again[name], leaf)
        np.testing.assert_array_equal(columns.reorder(leaf, shards, 1, back=False), dealt[name])
        np.testing.assert_array_equal(columns.reorder(dealt[name], shards, 1, back=True), leaf)


def test_fill_pads_rows_until_they_can_be_dealt():
    x_BT = jnp.ones((2, 13), int)
    with jax.set_mesh(make_mesh(sequence=4)):
        filled = columns.fill(x_BT)
        assert columns.can_deal(filled.shape[1])
        assert not columns.can_deal(12)
    np.testing.assert_array_equal(filled.sum(axis=0), [2] * 13 + [0] * 3)


def test_cannot_deal_outside_a_mesh():
    x_BT = jnp.ones((2, 13), int)
    assert columns.fill(x_BT) is x_BT
    assert not columns.can_deal(16)


def test_gradient_of_deal_is_not_summed_over_other_axes():
    """Replicas along the tensor axis are not summed."""

    def total(x_BT: jax.Array) -> jax.Array:
        return jnp.sum(columns.deal(x_BT) ** 2)

    with jax.set_mesh(make_mesh(2, 1, 2, sequence=2)):
        gradient = jax.jit(jax.grad(total))
        x_BT = jnp.arange(16.0).reshape(2, 8)
        np.testing.assert_array_equal(gradient(x_BT), 2 * x_BT)
        assert "all-reduce" not in gradient.lower(x_BT).compile().as_text()
