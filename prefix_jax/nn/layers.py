"""Building blocks of transformer layers.

Parameter names end in their axes (`q_DNH`). The mesh shards by these letters, and checkpoint name
tables refer to them. A weight matrix may be a `QTensor`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from prefix_jax.nn.attention.attend import attend
from prefix_jax.nn.attention.mask import MaskAndBias
from prefix_jax.nn.quantized import matmul
from prefix_jax.nn.remat import Name, keep, recomputed
from prefix_jax.nn.rotary import rotate
from prefix_jax.prefix import Site

_weights = nn.initializers.normal(0.02)
_ones, _zeros = nn.initializers.ones, nn.initializers.zeros


@flax.struct.dataclass
class AttentionInputs:
    """Position-dependent inputs of attention, shared by all layers of one kind.

    Attributes:
        masking: mask and bias.
        rotary: cos_BTH and sin_BTH of the queries' angles; None without rotary embeddings.
        column: int32 scalar, the first cache column to write; None without a cache. A cache
            whose rows have lengths of their own has one column per row.
    """

    masking: MaskAndBias
    rotary: tuple[jax.Array, jax.Array] | None = None
    column: jax.Array | None = None


class LayerCache(Protocol):
    """The KV cache of one layer, which decides where it stores keys and values.

    `KeysValues` writes the same columns in all rows. `engine.cache.Columns`, the cache of
    continuous batching, writes different columns in each row.
    """

    def write(self, new: KeysValues, column: jax.Array) -> Self:
        """Returns a copy with the keys and values of new tokens, written from `column`."""

    def read(self, masking: MaskAndBias) -> tuple[jax.Array, jax.Array, MaskAndBias]:
        """Returns k_BSKH, v_BSKH and the masking of the attention to them, given that of all
        layers."""


@flax.struct.dataclass
class KeysValues:
    """The KV cache of one layer: k_BKSH and v_BKSH.

    Heads come before tokens, the layout of attention's matrix products; with the opposite order
    every decoding step would transpose the whole cache.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array

    @classmethod
    def of(cls, k_BTKH: jax.Array, v_BTKH: jax.Array) -> KeysValues:
        """Builds a cache from the outputs of the projections."""
        return cls(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2))

    def write(self, new: KeysValues, column: jax.Array) -> KeysValues:
        """Returns a copy with `new` written at `column`."""
        return jax.tree.map(
            lambda old_BKSH, new_BKTH: jax.lax.dynamic_update_slice(
                old_BKSH, new_BKTH.astype(old_BKSH.dtype), (0, 0, column, 0)
            ),
            self,
            new,
        )

    def read(self, masking: MaskAndBias) -> tuple[jax.Array, jax.Array, MaskAndBias]:
        """Returns k_BSKH, v_BSKH and the masking, unchanged."""
        return self.k_BKSH.swapaxes(1, 2), self.v_BKSH.swapaxes(1, 2), masking


CacheT = TypeVar("CacheT", bound=LayerCache)


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last axis, in float32 (Zhang & Sennrich 2019).

    Attributes:
        epsilon: added to the mean square.
        axis: the letter of the last axis.
        plus_one: whether the scale is stored as its difference from 1 (Gemma).
    """

    epsilon: float
    axis: str = "D"
    plus_one: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first = _zeros if self.plus_one else _ones
        scale = self.param(f"scale_{self.axis}", first, (x.shape[-1],))
        if self.plus_one:
            scale = 1 + scale.astype(jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        scale_D = self.param("scale_D", _ones, (x_BTD.shape[-1],))
        bias_D = self.param("bias_D", _zeros, (x_BTD.shape[-1],))
        y = x_BTD.astype(jnp.float32)
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * scale_D + bias_D).astype(x_BTD.dtype)


class Attention(nn.Module):
    """Grouped-query attention with a prefix inside its softmax: self-attention or, given the keys
    and values of an encoder, cross-attention.

    Attributes:
        d_model: D.
        heads, kv_heads, head_dim: N, K and H.
        qkv_bias, out_bias: whether the projections have biases.
        qk_norm: constructs the norm over H of queries and keys (Qwen 3, Gemma 3), or None.
        scale: multiplies the logits; None for H ** -0.5.
        softcap: bounds the logits (Gemma 2), or None.
    """

    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Callable[[], RMSNorm] | None = None
    scale: float | None = None
    softcap: float | None = None

    def setup(self) -> None:
        D, N, K, H = self.d_model, self.heads, self.kv_heads, self.head_dim
        self.q_DNH = self.param("q_DNH", _weights, (D, N, H))
        self.k_DKH = self.param("k_DKH", _weights, (D, K, H))
        self.v_DKH = self.param("v_DKH", _weights, (D, K, H))
        self.o_NHD = self.param("o_NHD", _weights, (N, H, D))
        if self.qkv_bias:
            self.q_bias_NH = self.param("q_bias_NH", _zeros, (N, H))
            self.k_bias_KH = self.param("k_bias_KH", _zeros, (K, H))
            self.v_bias_KH = self.param("v_bias_KH", _zeros, (K, H))
        if self.out_bias:
            self.o_bias_D = self.param("o_bias_D", _zeros, (D,))
        if self.qk_norm is not None:
            self.q_norm, self.k_norm = self.qk_norm(), self.qk_norm()

    def keys_values(
        self, x_BTD: jax.Array, rotary: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array]:
        """k_BTKH after normalisation and rotation, and v_BTKH."""
        k_BTKH, v_BTKH = self.project(x_BTD)
        if self.qk_norm is not None:
            k_BTKH = self.k_norm(k_BTKH)
        if rotary is not None:
            k_BTKH = rotate(k_BTKH, *rotary)
        return k_BTKH, v_BTKH

    def project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """k_BTKH and v_BTKH straight from the projections."""
        k_BTKH = keep("k", matmul(x_BTD, self.k_DKH))
        v_BTKH = keep("v", matmul(x_BTD, self.v_DKH))
        if self.qkv_bias:
            k_BTKH, v_BTKH = k_BTKH + self.k_bias_KH, v_BTKH + self.v_bias_KH
        return k_BTKH, v_BTKH

    def __call__(
        self,
        x_BTD: jax.Array,
        inputs: AttentionInputs,
        site: Site | None,
        cache: CacheT | None,
        encoded: LayerCache | None = None,
    ) -> tuple[jax.Array, CacheT | None]:
        q_BTNH = keep("q", matmul(x_BTD, self.q_DNH))
        if self.qkv_bias:
            q_BTNH = q_BTNH + self.q_bias_NH
        if self.qk_norm is not None:
            q_BTNH = self.q_norm(q_BTNH)
        if inputs.rotary is not None:
            q_BTNH = rotate(q_BTNH, *inputs.rotary)
        masking = inputs.masking
        if encoded is not None:
            k_BSKH, v_BSKH, masking = encoded.read(masking)
        else:
            k_BSKH, v_BSKH = self.keys_values(x_BTD, inputs.rotary)
        if cache is not None:
            assert inputs.column is not None, "a cache requires inputs.column"
            cache = cache.write(KeysValues.of(k_BSKH, v_BSKH), inputs.column)
            k_BSKH, v_BSKH, masking = cache.read(masking)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        y_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, masking, site, scale, self.softcap)
        y_BTD = keep("o", matmul(y_BTNH, self.o_NHD, inputs=2))
        if self.out_bias:
            y_BTD = y_BTD + self.o_bias_D
        return y_BTD, cache


class MLP(nn.Module):
    """Feed-forward network, optionally gated (Shazeer 2020).

    Attributes:
        d_model, d_ff: D and F.
        activation: applied to the gate if there is one, else to the up projection.
        gated: whether there is a gate.
        bias: whether the projections have biases.
    """

    d_model: int
    d_ff: int
    activation: Callable[[jax.Array], jax.Array]
    gated: bool
    bias: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        D, F = self.d_model, self.d_ff

        def project(x: jax.Array, name: Name, axes: str, shape: tuple[int, int]) -> jax.Array:
            y = matmul(x, self.param(f"{name}_{axes}", _weights, shape))
            if self.bias:
                y = y + self.param(f"{name}_bias_{axes[1]}", _zeros, (shape[1],))
            return keep(name, y)

        y_BTF = project(x_BTD, "up", "DF", (D, F))
        # The backward pass recomputes the activation: it is cheap, and its residuals (the sigmoid,
        # its complement and the product, each F wide) would be most of a layer's memory.
        if self.gated:
            gate_BTF = project(x_BTD, "gate", "DF", (D, F))
            y_BTF = recomputed(lambda gate, up: self.activation(gate) * up)(gate_BTF, y_BTF)
        else:
            y_BTF = recomputed(self.activation)(y_BTF)
        return project(y_BTF, "down", "FD", (F, D))
