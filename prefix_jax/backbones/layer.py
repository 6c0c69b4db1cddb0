"""The transformer block that GPT-2 and the Llama family share, in their variants."""

from __future__ import annotations

import flax.linen as nn
import jax

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.nn.activations import activation
from prefix_jax.nn.layers import MLP, Attention, KeysValues, LayerNorm, RMSNorm, View
from prefix_jax.prefix import KVPrefix

NORMS: dict[str, type[RMSNorm | LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}


class Layer(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    arch: Architecture

    def setup(self) -> None:
        a = self.arch
        norm = NORMS[a.norm]
        self.attn_norm, self.mlp_norm = norm(a.epsilon), norm(a.epsilon)
        self.attn = Attention(
            a.d_model,
            a.heads,
            a.kv_heads,
            a.head_dim,
            qkv_bias=a.qkv_bias,
            out_bias=a.out_bias,
            qk_norm=a.epsilon if a.qk_norm else None,
        )
        self.mlp = MLP(a.d_model, a.d_ff, activation(a.activation), a.gated, a.mlp_bias)

    def keys_values(self, x_BTD: jax.Array, view: View) -> tuple[jax.Array, jax.Array]:
        """The keys and values, k_BTKH and v_BTKH, of hidden states at the layer's entry."""
        return self.attn.keys_values(self.attn_norm(x_BTD), view)

    def __call__(
        self, x_BTD: jax.Array, view: View, join: KVPrefix | None, cache: KeysValues | None
    ) -> tuple[jax.Array, KeysValues | None]:
        y_BTD, cache = self.attn(self.attn_norm(x_BTD), view, join, cache)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache
