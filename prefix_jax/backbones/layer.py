"""The transformer layer of all families, with its variants."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.nn.activations import activation
from prefix_jax.nn.layers import (
    MLP,
    Attention,
    AttentionInputs,
    CacheT,
    KeysValues,
    LayerCache,
    LayerNorm,
    RMSNorm,
)
from prefix_jax.prefix import Site


def make_norm(arch: Architecture, axis: str = "D") -> RMSNorm | LayerNorm:
    """A norm of the architecture's kind.

    Args:
        arch: the architecture.
        axis: the letter of the axis that is normalised.
    """
    if arch.norm == "layer":
        return LayerNorm(arch.epsilon)
    return RMSNorm(arch.epsilon, axis, plus_one=arch.norm == "rms_plus_one")


class Layer(nn.Module):
    """A layer: self-attention, cross-attention if there is an encoder, and a feed-forward network,
    each with a residual connection and a norm at the place that `arch.norm_at` names."""

    arch: Architecture

    def setup(self) -> None:
        a = self.arch
        attention = functools.partial(
            Attention,
            a.d_model,
            a.heads,
            a.kv_heads,
            a.head_dim,
            qkv_bias=a.qkv_bias,
            out_bias=a.out_bias,
            scale=a.attention_scale,
            softcap=a.attention_softcap,
        )
        self.attn = attention(
            qk_norm=functools.partial(_head_norm, a) if a.qk_norm else None,
        )
        self.attn_norm = make_norm(a)
        if a.encoder is not None:
            self.cross, self.cross_norm = attention(), make_norm(a)
        self.mlp = MLP(a.d_model, a.d_ff, activation(a.activation), a.gated, a.mlp_bias)
        self.mlp_norm = make_norm(a)
        if a.norm_at == "around":
            self.attn_out_norm, self.mlp_out_norm = make_norm(a), make_norm(a)

    def keys_values(
        self, x_BTD: jax.Array, rotary: tuple[jax.Array, jax.Array] | None
    ) -> KeysValues:
        """Keys and values of the layer's input."""
        return KeysValues.of(*self.attn.keys_values(self.attention_input(x_BTD), rotary))

    def attention_input(self, x_BTD: jax.Array) -> jax.Array:
        """The input of self-attention, given the layer's input."""
        return x_BTD if self.arch.norm_at == "after" else self.attn_norm(x_BTD)

    def project_keys_values(self, x_BTD: jax.Array) -> KeysValues:
        """Keys and values straight from the projections, without norm and rotation."""
        return KeysValues.of(*self.attn.project(x_BTD))

    def cross_keys_values(self, h_BSD: jax.Array) -> KeysValues:
        """Keys and values of cross-attention to the encoder's output."""
        return KeysValues.of(*self.cross.keys_values(h_BSD, None))

    def __call__(
        self,
        x_BTD: jax.Array,
        inputs: AttentionInputs,
        site: Site | None,
        cache: CacheT | None,
        cross_inputs: AttentionInputs | None = None,
        cross_site: Site | None = None,
        encoded: LayerCache | None = None,
    ) -> tuple[jax.Array, CacheT | None]:
        a = self.arch
        around = a.norm_at == "around"

        def attend(x_BTD: jax.Array) -> jax.Array:
            nonlocal cache
            y_BTD, cache = self.attn(x_BTD, inputs, site, cache)
            return y_BTD

        if a.parallel:
            y_BTD = attend(self.attn_norm(x_BTD)) + self.mlp(self.mlp_norm(x_BTD))
            return x_BTD + y_BTD, cache
        x_BTD = self._add(x_BTD, attend, self.attn_norm, self.attn_out_norm if around else None)
        if encoded is not None and cross_inputs is not None:
            x_BTD = self._add(
                x_BTD,
                lambda x_BTD: self.cross(x_BTD, cross_inputs, cross_site, None, encoded)[0],
                self.cross_norm,
                None,
            )
        x_BTD = self._add(x_BTD, self.mlp, self.mlp_norm, self.mlp_out_norm if around else None)
        return x_BTD, cache

    def _add(
        self,
        x_BTD: jax.Array,
        sublayer: Callable[[jax.Array], jax.Array],
        norm: Callable[[jax.Array], jax.Array],
        out_norm: Callable[[jax.Array], jax.Array] | None,
    ) -> jax.Array:
        if self.arch.norm_at == "after":
            return norm(x_BTD + sublayer(x_BTD))
        y_BTD = sublayer(norm(x_BTD))
        return x_BTD + (y_BTD if out_norm is None else out_norm(y_BTD))


def _head_norm(arch: Architecture) -> RMSNorm:
    return RMSNorm(arch.epsilon, "H", plus_one=arch.norm == "rms_plus_one")
