"""Static masks of splash attention for long rows.

JAX inspects every tile of a mask before it compiles a kernel: 65,000 tiles of 512 x 512 for a row
of 128k tokens, for two minutes. Most tiles are fully visible or fully masked, which can be
decided from their corners.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks


class Causal(masks.LocalMask):
    """Causal mask with an optional window.

    Args:
        queries: the column of each query, int32 [T].
        keys: the number of keys, in column order.
        window: the number of keys that a query sees, including its own; None for all before it.
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
    """One shared array for all uniform tiles, contiguous so that NumPy scans it fastest."""
    return np.full(size, seen)
