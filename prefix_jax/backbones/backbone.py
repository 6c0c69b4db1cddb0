"""A frozen transformer that attends to prefixes: a decoder, an encoder or an encoder-decoder."""

from __future__ import annotations

import dataclasses
from typing import Any, overload

import jax
import jax.numpy as jnp

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.cache import Cache, Encoded
from prefix_jax.backbones.layer import Layer
from prefix_jax.backbones.soft import prepend
from prefix_jax.backbones.stack import Stack, normal
from prefix_jax.backbones.stacking import (
    Params,
    as_stacked,
    pick_layers,
    to_stacked,
    to_unstacked,
)
from prefix_jax.errors import BackboneError
from prefix_jax.lift import Slots, lift
from prefix_jax.nn import vocabulary
from prefix_jax.nn.attention import zigzag
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.nn.layers import KeysValues
from prefix_jax.nn.quantized import Weight, matmul, take
from prefix_jax.nn.remat import Remat
from prefix_jax.prefix import Geometry, Layers, Prefix, Produced, StackName


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The computation of a transformer. Its weights are an argument of every method, stacked or
    unstacked (`stacking`).

    Attributes:
        arch: the shape and the variant.
        remat: what the backward pass keeps; see `nn.remat`.
    """

    arch: Architecture
    remat: Remat = "none"

    @property
    def geometry(self) -> Geometry:
        """The dimensions that a prefix depends on."""
        return self.arch.geometry

    @property
    def stack(self) -> Stack:
        """The stack whose output a head reads: the decoder, or an encoder-only model's encoder."""
        return Stack(self.arch, self.remat)

    @property
    def encoder(self) -> Stack:
        """The encoder of an encoder-decoder.

        Raises:
            BackboneError: the model is a single stack.
        """
        if self.arch.encoder is None:
            raise BackboneError(f"{self.arch.model_type} is a single stack without an encoder")
        return Stack(self.arch.encoder, self.remat)

    @property
    def input_stack(self) -> StackName:
        """The stack that reads the input text."""
        return self.stack.site if self.arch.encoder is None else "encoder"

    def room(self, prefix: Prefix | None, stack: StackName) -> int:
        """The maximum number of text tokens of a stack, given a prefix."""
        of_encoder_decoder = self.arch.encoder is not None and stack == "encoder"
        positions = (self.encoder if of_encoder_decoder else self.stack).arch.max_positions
        if prefix is None:
            return positions
        soft_tokens = prefix.soft_tokens if stack == "encoder" else 0
        return positions - prefix.text_position_in(stack) - soft_tokens

    # Weights.

    def init(self, rng: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> Params:
        """Random weights with stacked layers. Under `jax.eval_shape`, the abstract tree that a
        checkpoint is loaded into."""
        a = self.arch
        rngs = jax.random.split(rng, 4)
        params = self.stack.init(rngs[0])
        tokens_VD = normal(rngs[1], a.vocab, a.geometry.input_dim)
        params["embed"] = {"tokens_VD": tokens_VD, **params.get("embed", {})}
        if a.encoder is not None:
            params["encoder"] = self.encoder.init(rngs[2])
            if a.encoder.own_tokens:
                own_VD = normal(jax.random.fold_in(rngs[2], 1), a.vocab, a.geometry.input_dim)
                embed = params["encoder"].get("embed", {})
                params["encoder"]["embed"] = {"tokens_VD": own_VD, **embed}
        head: dict[str, jax.Array] = {}
        if not a.tied:
            head["unembed_DV"] = normal(rngs[3], a.d_model, a.vocab)
        if a.head_bias:
            head["bias_V"] = jnp.zeros((a.vocab,))
        if head:
            params["head"] = head
        if a.pooler:
            weight_DD = normal(rngs[3], a.d_model, a.d_model)
            params["pooler"] = {"weight_DD": weight_DD, "bias_D": jnp.zeros((a.d_model,))}
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def unstacked(self, params: Params) -> Params:
        """Unstacks the layers of the weights in place; `params` cannot be used afterwards."""
        params = to_unstacked(params)
        if self.arch.encoder is not None:
            params = {**params, "encoder": to_unstacked(params["encoder"])}
        return params

    def stacked(self, params: Params) -> Params:
        """Stacks the layers of the weights in place; `params` cannot be used afterwards."""
        params = to_stacked(params)
        if self.arch.encoder is not None:
            params = {**params, "encoder": to_stacked(params["encoder"])}
        return params

    # The primitives of `lift`.

    def lift(self, params: Params, produced: Produced | None) -> Prefix | None:
        """Converts the output of a method to a prefix; see `lift`."""
        return lift(self, params, produced)

    def prompt_keys_values(self, params: Params, x_APD: jax.Array) -> Slots:
        """Runs A prompts of P soft tokens through the decoder, each without the others.

        Returns:
            k_LPKH and v_LPKH, [L, A * P, K, H], one prompt after the other.

        Raises:
            ContextError: a prompt is longer than the table of learned positions.
        """
        x_APD = x_APD.astype(dtype_of(params))
        self.stack.check_length(x_APD.shape[1])
        layout = TokenLayout.plain(jnp.ones(x_APD.shape[:2], bool))
        x_APD = self.stack.embed_positions(params, x_APD, layout, 0)
        keys_values, _ = self.keys_values_and_inputs(params, x_APD, layout)
        return as_slots(keys_values)

    def state_keys_values(self, params: Params, h_LPD: jax.Array) -> Slots:
        """Keys and values of states that each layer reads at positions 0 to P - 1."""
        layout = TokenLayout.plain(jnp.ones((1, h_LPD.shape[1]), bool))
        h_L1PD = h_LPD[:, None].astype(dtype_of(params))
        return as_slots(self.stack.keys_values(params, h_L1PD, layout))

    def projected_keys_values(self, params: Params, h_LPD: jax.Array, layers: Layers) -> Slots:
        """Projections of states in some layers, without norm and rotation."""
        h_L1PD = h_LPD[:, None].astype(dtype_of(params))
        weights = pick_layers(params, layers)
        return as_slots(self.stack.map_layers(weights, Layer.project_keys_values, h_L1PD))

    def keys_values_and_inputs(
        self, params: Params, x_BTD: jax.Array, layout: TokenLayout, encoded: Encoded | None = None
    ) -> tuple[KeysValues, jax.Array]:
        """Runs the stack without a prefix.

        Returns:
            The stacked keys and values of its self-attention, [L, B, K, T, H], and the inputs of
            its layers, h_LBTD.
        """
        stack = self.stack
        if not self.arch.causal:
            _, _, h_LBTD = stack.run(params, x_BTD, layout, layer_inputs=True)
            return stack.keys_values(params, h_LBTD, layout), h_LBTD
        cache = self.empty_cache(params, *x_BTD.shape[:2])
        _, cache, h_LBTD = stack.run(
            params, x_BTD, layout, cache=cache, encoded=encoded, layer_inputs=True
        )
        return as_stacked(cache.layers), h_LBTD

    # The forward pass.

    def empty_cache(self, params: Params, rows: int, columns: int) -> Cache:
        """A KV cache for `rows` rows of up to `columns` tokens, in the dtype of the weights.

        Raises:
            BackboneError: the model is an encoder.
        """
        self._require_decoder()
        unstacked = isinstance(params["layers"], tuple)
        return self.stack.empty_cache(dtype_of(params), rows, columns, unstacked)

    def encode(
        self, params: Params, ids_BS: jax.Array, layout: TokenLayout, prefix: Prefix | None = None
    ) -> Encoded:
        """Runs the encoder of an encoder-decoder.

        Args:
            params: the weights of the backbone.
            ids_BS: token ids of the source.
            layout: their layout.
            prefix: the prefix. Its soft tokens become the first P columns; a row with soft tokens
                may hold only one example.

        Returns:
            The argument `encoded` of `hidden`.

        Raises:
            BackboneError: the model has no encoder.
            ContextError: a position exceeds the learned positions; see `Stack.embed_positions`.
        """
        h_BSD, layout = self._run_encoder(
            self.encoder, params, params["encoder"], ids_BS, layout, prefix
        )
        return self.cross_keys_values(params, h_BSD, layout)

    def cross_keys_values(self, params: Params, h_BSD: jax.Array, layout: TokenLayout) -> Encoded:
        """The keys and values of the decoder's cross-attention to an encoder's output."""
        if isinstance(params["layers"], tuple):
            layers: Any = tuple(
                Layer(self.arch).apply({"params": weights}, h_BSD, method=Layer.cross_keys_values)
                for weights in params["layers"]
            )
        else:
            layers = self.stack.map_layers(params, lambda layer: layer.cross_keys_values(h_BSD))
        return Encoded(layers, layout)

    @overload
    def hidden(
        self,
        params: Params,
        ids_BT: jax.Array,
        layout: TokenLayout,
        prefix: Prefix | None = None,
        cache: None = None,
        lineage_BTS: jax.Array | None = None,
        encoded: Encoded | None = None,
    ) -> tuple[jax.Array, None]: ...

    @overload
    def hidden(
        self,
        params: Params,
        ids_BT: jax.Array,
        layout: TokenLayout,
        prefix: Prefix | None,
        cache: Cache,
        lineage_BTS: jax.Array | None = None,
        encoded: Encoded | None = None,
    ) -> tuple[jax.Array, Cache]: ...

    def hidden(
        self,
        params: Params,
        ids_BT: jax.Array,
        layout: TokenLayout,
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        lineage_BTS: jax.Array | None = None,
        encoded: Encoded | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Computes the last hidden states of tokens.

        Args:
            params: the weights of the backbone.
            ids_BT: token ids.
            layout: their layout. Positions count from 0; the prefix's text position is added here.
            prefix: the prefix that every layer attends to; None is the bare model.
            cache: keys and values of earlier tokens, with room for T more columns.
            lineage_BTS: True where a token descends from a key, in place of branches.
            encoded: the output of `encode`, if the model has an encoder.

        Returns:
            h_BTD after the final norm, and the cache with these tokens. For an encoder-only model,
            the soft tokens of the prefix are the first P columns.

        Raises:
            BackboneError: the model has an encoder and `encoded` is missing, or the reverse.
            ContextError: a position exceeds the learned positions; see `Stack.embed_positions`.
        """
        if (self.arch.encoder is None) != (encoded is None):
            has, call = ("no", "without") if encoded is not None else ("an", "with")
            raise BackboneError(
                f"{self.arch.model_type} has {has} encoder; call `hidden` {call} the output of "
                "`encode`"
            )
        T = ids_BT.shape[1]
        if not self.arch.causal:
            T += 0 if prefix is None else prefix.soft_tokens
            h_BTD, _ = self._run_encoder(self.stack, params, params, ids_BT, layout, prefix)
            return h_BTD[:, :T], None
        if cache is None and lineage_BTS is None:
            ids_BT, layout = zigzag.pad((ids_BT, layout))
        stack = self.stack
        text_position = 0 if prefix is None else prefix.text_position_in("decoder")
        x_BTD = self.embed(params, ids_BT)
        x_BTD = stack.embed_positions(params, x_BTD, layout, text_position)
        h_BTD, cache, _ = stack.run(params, x_BTD, layout, prefix, cache, lineage_BTS, encoded)
        return stack.final_norm(params, h_BTD)[:, :T], cache

    def _run_encoder(
        self,
        stack: Stack,
        params: Params,
        weights: Params,
        ids_BS: jax.Array,
        layout: TokenLayout,
        prefix: Prefix | None,
    ) -> tuple[jax.Array, TokenLayout]:
        """Runs an encoder, whose `weights` are part of `params`.

        Returns:
            Its output, and the layout of its tokens with soft tokens and padding columns.
        """
        ids_BS, layout = zigzag.pad((ids_BS, layout))
        x_BSD = self.embed(params, ids_BS, self.input_table(params))
        x_BSD, layout = zigzag.pad(prepend(prefix, x_BSD, layout))
        text_position = 0 if prefix is None else prefix.text_position_in("encoder")
        x_BSD = stack.embed_positions(weights, x_BSD, layout, text_position)
        h_BSD, _, _ = stack.run(weights, x_BSD, layout, prefix)
        return stack.final_norm(weights, h_BSD), layout

    # Embeddings and heads.

    def embed(self, params: Params, ids_BT: jax.Array, table_VD: Weight | None = None) -> jax.Array:
        """Scaled token embeddings in the dtype of the weights, x_BTD.

        Args:
            params: the weights of the backbone.
            ids_BT: token ids.
            table_VD: the embedding table; None for the decoder's.
        """
        table_VD = params["embed"]["tokens_VD"] if table_VD is None else table_VD
        x_BTD = take(table_VD, ids_BT)
        if self.arch.embed_scale is not None:
            x_BTD = x_BTD * jnp.asarray(self.arch.embed_scale, x_BTD.dtype)
        return x_BTD

    def input_table(self, params: Params) -> Weight:
        """The embedding table of `input_stack`, tokens_VD."""
        encoder = self.arch.encoder
        own = encoder is not None and encoder.own_tokens
        table_VD: Weight = (params["encoder"] if own else params)["embed"]["tokens_VD"]
        return table_VD

    def unembed(self, params: Params, h_BTD: jax.Array) -> jax.Array:
        """Float32 logits_BTV. Call it only for targets: V is large.

        Raises:
            BackboneError: the model is an encoder.
        """
        self._require_decoder()
        a = self.arch
        if a.head_scale is not None:
            h_BTD = h_BTD * jnp.asarray(a.head_scale, h_BTD.dtype)
        weight = params["embed"]["tokens_VD"] if a.tied else params["head"]["unembed_DV"]
        logits_BTV = matmul(h_BTD, weight, transposed=a.tied, dtype=jnp.float32)
        if a.head_bias:
            logits_BTV = logits_BTV + params["head"]["bias_V"]
        if a.logit_softcap is not None:
            logits_BTV = a.logit_softcap * jnp.tanh(logits_BTV / a.logit_softcap)
        return logits_BTV

    def unembedding(self, params: Params) -> Params:
        """The weights that `unembed` reads, sharded for a loop over chunks of targets."""
        head = params.get("head", {})
        if self.arch.tied:
            table_VD = vocabulary.head(params["embed"]["tokens_VD"], 0)
            return {"embed": {"tokens_VD": table_VD}, "head": head}
        return {"head": {**head, "unembed_DV": vocabulary.head(head["unembed_DV"], 1)}}

    def pool(self, params: Params, h_BD: jax.Array) -> jax.Array:
        """Applies BERT's pretrained pooler to the hidden state of each example's first token."""
        pooler = params["pooler"]
        return jnp.tanh(h_BD @ pooler["weight_DD"] + pooler["bias_D"])

    def _require_decoder(self) -> None:
        if not self.arch.causal:
            raise BackboneError(
                f"{self.arch.model_type} is an encoder and cannot generate text; train it for a "
                "task with labels (task.name: classify, regress, tag, span or choice), or use a "
                "decoder"
            )


def as_slots(layers: KeysValues) -> Slots:
    """Converts keys and values of rows, [L, B, K, P, H], to k_LPKH and v_LPKH, one row after the
    other."""

    def concatenate(x_LBKPH: jax.Array) -> jax.Array:
        L, B, K, P, H = x_LBKPH.shape
        return x_LBKPH.swapaxes(2, 3).reshape(L, B * P, K, H)

    return concatenate(layers.k_BKSH), concatenate(layers.v_BKSH)


def dtype_of(params: Params) -> jax.typing.DTypeLike:
    """The dtype of the weights."""
    dtype: jax.typing.DTypeLike = params["embed"]["tokens_VD"].dtype
    return dtype
