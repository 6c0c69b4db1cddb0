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


class Causal(masks.LocalMask):
    """A query sees the last keys up to its own.

    Args:
        queries: which column each query is, int32 [T].
        keys: columns, in order.
        window: how many of them a query sees, its own included; None for all before it.
    """

    def __init__(self, queries: np.ndarray, keys: int, window: int | None):
        reach = None if window is None else window - 1
        super().__init__((len(queries), keys), (reach, 0), offset=0)
        self.q_sequence = queries
        self._window = np.inf if window is None else window

    def __getitem__(self, tile: Any) -> np.ndarray:
        rows = self.q_sequence[tile[0]]
        first, last = (tile[1].indices(self.shape[1])[i] - i for i in (0, 1))
        oldest, newest = rows.min(), rows.max()
        size = len(rows), last - first + 1
        if first > newest or last <= oldest - self._window:
            return _uniform(size, seen=False)
        if last <= oldest and first > newest - self._window:
            return _uniform(size, seen=True)
        compared: np.ndarray = super().__getitem__(tile)
        return compared


@functools.cache
def _uniform(size: tuple[int, int], seen: bool) -> np.ndarray:
    """One array for all such tiles, laid out as NumPy looks through it fastest."""
    return np.full(size, seen)
