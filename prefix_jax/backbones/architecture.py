"""What a decoder looks like, whatever its family: the numbers that shape it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from prefix_jax.nn.rotary import Rotary
from prefix_jax.prefix import Geometry


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The shape and the variant of a decoder-only transformer.

    Attributes:
        family: which module knows its config and the names of its weights ("gpt2" or "llama").
        model_type: the name that its checkpoint gives itself ("mistral", "qwen3", …).
        layers: L.
        d_model: D.
        heads, kv_heads, head_dim: N, K and H.
        d_ff: F.
        vocab: V.
        max_positions: the length of the position table, or the longest context that the model
            was trained for; prefix included.
        norm: "rms" or "layer".
        epsilon: of the norms.
        activation: of the feed-forward, by its Hugging Face name.
        gated: whether the feed-forward has a gate.
        rotary: rotary frequencies; None where positions are learned.
        qkv_bias, out_bias, mlp_bias: which projections add biases.
        qk_norm: whether queries and keys are normalised per head (Qwen 3).
        window: how many positions back a sliding layer sees, its own included.
        sliding: for every layer, whether it uses `window`.
        tied: whether the head is the token embedding.
    """

    family: Literal["gpt2", "llama"]
    model_type: str
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    vocab: int
    max_positions: int
    norm: Literal["rms", "layer"]
    epsilon: float
    activation: str
    gated: bool
    rotary: Rotary | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    sliding: tuple[bool, ...] = ()
    tied: bool = True

    @property
    def geometry(self) -> Geometry:
        """The part of the shape that a prefix has to match."""
        return Geometry(
            self.layers, self.heads, self.kv_heads, self.head_dim, self.d_model, self.vocab
        )
