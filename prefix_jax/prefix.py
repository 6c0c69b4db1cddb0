"""What a prefix is: the types that methods produce, backbones lift and attention reads.

A prefix is a KV cache that you can train. A method produces one of three values, and
`Backbone.lift` turns each of them into a `Prefix`, the only form that attention knows:

    Embeds   x_PD    soft tokens at the input embeddings (prompt tuning)
    Hidden   h_LPD   hidden states that stand before the tokens in every layer
    Prefix   k, v    keys and values, layer by layer
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax


@flax.struct.dataclass
class KVPrefix:
    """Keys and values that join the softmax of every layer.

    Attributes:
        k_LPKH: keys as attention reads them, after any rotary embedding.
        v_LPKH: values.
        bias_LPN: added to the attention logits of each query head; minus infinity makes a slot
            absent. None adds nothing.
    """

    k_LPKH: jax.Array
    v_LPKH: jax.Array
    bias_LPN: jax.Array | None = None

    @property
    def length(self) -> int:
        """P, the number of prefix slots."""
        return self.k_LPKH.shape[-3]


@flax.struct.dataclass
class Site:
    """What one attention site (decoder self-attention, say) gains from a prefix.

    Attributes:
        join: keys and values inside the softmax.
    """

    join: KVPrefix


@flax.struct.dataclass
class Prefix:
    """A prefix as attention reads it.

    Attributes:
        decoder: the site at the decoder's self-attention.
        offset: the position of the first token of text. P by default, as in PEFT and in the
            original GPT-2 code of Li & Liang (2021).
        pinned: whether the prefix stays visible when a sliding window has moved past it. False
            lets it fall out, as ordinary past tokens do.
    """

    decoder: Site
    offset: int = flax.struct.field(pytree_node=False, default=0)
    pinned: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def length(self) -> int:
        """P, the number of slots at the decoder's self-attention."""
        return self.decoder.join.length


@flax.struct.dataclass
class Hidden:
    """Hidden states that stand before the tokens at the entry of every layer, h_LPD."""

    h_LPD: jax.Array


@flax.struct.dataclass
class Embeds:
    """Soft tokens that stand before the tokens at the input embeddings, x_PD."""

    x_PD: jax.Array


Produced = Embeds | Hidden | Prefix


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The shape of a backbone as far as a prefix cares.

    Attributes:
        layers: L.
        query_heads: N.
        kv_heads: K.
        head_dim: H.
        d_model: D.
        vocab: V.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    d_model: int
    vocab: int
