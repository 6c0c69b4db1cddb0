"""Where the keys and values of each layer lie in PEFT's `prompt_embeddings`, and back.

A row of it, one for each slot, is [stored layer, key or value, K, H], flattened. With a single
stack, the layer l reads stored layer l.

For an encoder-decoder PEFT doubles the row and splits it into groups of four halves, as if each
layer had keys and values for its self-attention and for its attention to the encoder; the second
pair is then thrown away. So decoder layer l reads stored layer 2l mod S of S stored layers: for odd
S a permutation, while for even S half of the layers read what the other half does.
"""

from __future__ import annotations

import numpy as np

from prefix_jax.errors import PrefixError
from prefix_jax.prefix import SiteShape


def stored_layers(layers: int, doubled: bool) -> int:
    """How many layers to store so that every layer has its own: S, as above.

    Of an encoder-decoder the next odd number will do: one that nothing reads, if `layers` is even.

    Args:
        layers: L, of the stack that reads them.
        doubled: whether that is the decoder of an encoder-decoder.
    """
    return layers if not doubled or layers % 2 else layers + 1


def read_by(layers: int, stored: int, doubled: bool) -> np.ndarray:
    """The stored layer that each layer reads, [L]."""
    return np.arange(layers) * 2 % stored if doubled else np.arange(layers)


def flatten(k_LPKH: np.ndarray, v_LPKH: np.ndarray, doubled: bool) -> np.ndarray:
    """`prompt_embeddings`, (P, S · 2 · K · H), from which every layer reads its own."""
    L, P, K, H = k_LPKH.shape
    stored = stored_layers(L, doubled)
    # S stands for the stored layers, 2 for key and value.
    x_S2PKH = np.zeros((stored, 2, P, K, H), np.float32)
    x_S2PKH[read_by(L, stored, doubled)] = np.stack([k_LPKH, v_LPKH], axis=1)
    return x_S2PKH.transpose(2, 0, 1, 3, 4).reshape(P, -1)


def unflatten(
    flat: np.ndarray, shape: SiteShape, doubled: bool, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """k_LPKH and v_LPKH as the layers of a stack read them from `prompt_embeddings`.

    Args:
        flat: (P, S · 2 · K · H).
        shape: of the stack's attention.
        doubled: whether that is the decoder of an encoder-decoder.
        where: the file, for messages.

    Raises:
        PrefixError: it was made for another shape.
    """
    P, width = flat.shape
    L, K, H = shape.layers, shape.kv_heads, shape.head_dim
    stored, rest = divmod(width, 2 * K * H)
    if rest or (stored < L if doubled else stored != L):
        least = "at least " if doubled else ""
        raise PrefixError(
            f"{where}: prompt_embeddings has {width} numbers a slot; {least}{L * 2 * K * H} are "
            f"needed by this backbone, whose prefix has {L} layers of {K} key/value heads of "
            f"{H} numbers: give the backbone that the adapter was trained for"
        )
    x_S2PKH = flat.reshape(P, stored, 2, K, H).transpose(1, 2, 0, 3, 4)
    k_LPKH, v_LPKH = x_S2PKH[read_by(L, stored, doubled)].swapaxes(0, 1)
    return k_LPKH, v_LPKH
