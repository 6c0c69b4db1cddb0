"""Converts the layout of keys and values to and from PEFT's `prompt_embeddings`.

Each row, one per slot, is [stored layer, key or value, K, H], flattened. In a single stack, layer l
reads stored layer l.

For an encoder-decoder, PEFT doubles the row and splits it into groups of four halves, as if each
layer had keys and values for self-attention and for cross-attention, and then discards the second
pair. Decoder layer l therefore reads stored layer 2l mod S of S stored layers. For odd S this is a
permutation; for even S, half of the layers read the same stored layers as the other half.
"""

from __future__ import annotations

import numpy as np

from prefix_jax.errors import PrefixError
from prefix_jax.prefix import SiteShape


def stored_layers(layers: int, doubled: bool) -> int:
    """Returns the number of stored layers S that gives every layer its own keys and values.

    For an encoder-decoder this is the next odd number. If `layers` is even, the additional stored
    layer is never read.

    Args:
        layers: the number of layers L in the stack.
        doubled: whether the stack is the decoder of an encoder-decoder.
    """
    return layers if not doubled or layers % 2 else layers + 1


def read_by(layers: int, stored: int, doubled: bool) -> np.ndarray:
    """Returns the index of the stored layer that each layer reads, [L]."""
    return np.arange(layers) * 2 % stored if doubled else np.arange(layers)


def flatten(k_LPKH: np.ndarray, v_LPKH: np.ndarray, doubled: bool) -> np.ndarray:
    """Flattens keys and values to `prompt_embeddings`, (P, S · 2 · K · H)."""
    L, P, K, H = k_LPKH.shape
    stored = stored_layers(L, doubled)
    # Axis S: stored layers; axis 2: key and value.
    x_S2PKH = np.zeros((stored, 2, P, K, H), np.float32)
    x_S2PKH[read_by(L, stored, doubled)] = np.stack([k_LPKH, v_LPKH], axis=1)
    return x_S2PKH.transpose(2, 0, 1, 3, 4).reshape(P, -1)


def unflatten(
    flat: np.ndarray, shape: SiteShape, doubled: bool, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Extracts the k_LPKH and v_LPKH that the layers of a stack read from `prompt_embeddings`.

    Args:
        flat: (P, S · 2 · K · H).
        shape: the shape of the stack's attention.
        doubled: whether the stack is the decoder of an encoder-decoder.
        where: the file, for messages.

    Raises:
        PrefixError: the array was made for another shape.
    """
    P, width = flat.shape
    L, K, H = shape.layers, shape.kv_heads, shape.head_dim
    stored, rest = divmod(width, 2 * K * H)
    if rest or (stored < L if doubled else stored != L):
        least = "at least " if doubled else ""
        raise PrefixError(
            f"{where}: prompt_embeddings has {width} numbers per slot, but this backbone needs "
            f"{least}{L * 2 * K * H}: {L} layers of {K} key/value heads with {H} numbers each; "
            "give the backbone that the adapter was trained for"
        )
    x_S2PKH = flat.reshape(P, stored, 2, K, H).transpose(1, 2, 0, 3, 4)
    k_LPKH, v_LPKH = x_S2PKH[read_by(L, stored, doubled)].swapaxes(0, 1)
    return k_LPKH, v_LPKH
