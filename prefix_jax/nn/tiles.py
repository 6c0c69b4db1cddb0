"""The static masks of splash attention, for long rows.

JAX looks at every tile of a mask before it compiles a kernel: 65,000 of 512 x 512 for a row of 128k
tokens, two minutes of comparisons. Most tiles are seen as a whole or not at all, which their ends
tell.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks


def causal(queries: np.ndarray, keys: int, window: int | None) -> masks.Mask:
    """A query sees no later key.

    Args:
        queries: which column each query is, int32 [T].
        keys: columns, in order.
        window: how many of them a query sees, its own included; None for all before it.
    """
    shape = len(queries), keys
    mask: Causal | Window = Causal(shape) if window is None else Window(shape, window)
    mask.q_sequence = queries
    return mask


class Causal(masks.CausalMask):
    """A query sees every key up to its own."""

    def __getitem__(self, tile: Any) -> np.ndarray:
        return _tile(self, super(), tile, None)


class Window(masks.LocalMask):
    """A query sees the last keys up to its own."""

    def __init__(self, shape: tuple[int, int], window: int):
        super().__init__(shape, (window - 1, 0), offset=0)
        self._window = window

    def __getitem__(self, tile: Any) -> np.ndarray:
        return _tile(self, super(), tile, self._window)


@functools.cache
def _uniform(size: tuple[int, int], seen: bool) -> np.ndarray:
    """One array for all such tiles, laid out as NumPy looks through it fastest."""
    return np.full(size, seen)


def _tile(mask: Any, plain: Any, tile: tuple[slice, slice], window: int | None) -> np.ndarray:
    """A tile of a mask, bool [rows, columns], compared only where its ends do not tell."""
    rows = mask.q_sequence[tile[0]]
    first, last = (tile[1].indices(mask.shape[1])[i] - i for i in (0, 1))
    oldest, newest = rows.min(), rows.max()
    reach = np.inf if window is None else window
    size = len(rows), last - first + 1
    if first > newest or last <= oldest - reach:
        return _uniform(size, seen=False)
    if last <= oldest and first > newest - reach:
        return _uniform(size, seen=True)
    compared: np.ndarray = plain.__getitem__(tile)
    return compared
