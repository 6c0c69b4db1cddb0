"""Keys and values that a decoder keeps: of its own tokens, and of its encoder's output."""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.nn.layers import KeysValues


@flax.struct.dataclass
class Cache:
    """The KV cache of a decoder.

    Attributes:
        layers: a tuple of L `KeysValues`, or one whose arrays have a leading L axis, as the layers
            of the weights are unstacked or stacked.
        layout: the layout of the cached tokens, [B, S]; segment 0 marks an unused column.
        length: int32 scalar, the number of columns in use.
    """

    layers: KeysValues | tuple[KeysValues, ...]
    layout: TokenLayout
    length: jax.Array

    def grow(self, columns: int) -> Cache:
        """Returns a copy with room for `columns` more columns."""

        def pad(axis: int) -> Callable[[jax.Array], jax.Array]:
            return lambda x: jnp.pad(
                x, [(0, columns if i == x.ndim + axis else 0) for i in range(x.ndim)]
            )

        layers, layout = jax.tree.map(pad(-2), self.layers), jax.tree.map(pad(-1), self.layout)
        return Cache(layers, layout, self.length)


@flax.struct.dataclass
class Encoded:
    """The output of an encoder, as keys and values of the decoder's cross-attention.

    Attributes:
        layers: as in `Cache`.
        layout: the layout of the encoder's tokens, [B, S].
    """

    layers: KeysValues | tuple[KeysValues, ...]
    layout: TokenLayout
