"""Tiles of a mask match a comparison of every query with every key."""

from __future__ import annotations

import numpy as np
import pytest

from prefix_jax.nn.attention import tiles
from prefix_jax.nn.attention.zigzag import original_columns


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("shards", [1, 4])
def test_every_tile_matches_the_mask(window: int | None, shards: int):
    queries = original_columns(64, shards)
    mask = tiles.Causal(queries, 64, window)
    distance = queries[:, None] - np.arange(64)
    expected = (distance >= 0) & (distance < (window or 64))
    for q in range(0, 64, 8):
        for k in range(0, 64, 16):
            tile = slice(q, q + 8), slice(k, k + 16)
            np.testing.assert_array_equal(mask[tile], expected[tile])
    np.testing.assert_array_equal(mask[:, :], expected)


def test_masks_of_different_queries_are_not_equal():
    """JAX caches mask information by hash."""
    first, second = (tiles.Causal(original_columns(64, shards), 64, None) for shards in (1, 4))
    assert first != second
    assert first == tiles.Causal(original_columns(64, 1), 64, None)
    assert tiles.Causal(original_columns(64, 1), 64, 3) != tiles.Causal(
        original_columns(64, 1), 64, 4
    )
