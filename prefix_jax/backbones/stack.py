"""A stack of frozen transformer layers that attends to a prefix: a decoder or an encoder.

All functions accept stacked and unstacked weights (`stacking`).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.attention_inputs import attention_inputs, rotary_angles
from prefix_jax.backbones.cache import Cache, Encoded
from prefix_jax.backbones.layer import Layer, make_norm
from prefix_jax.backbones.stacking import Params, stack_layers
from prefix_jax.errors import ContextError
from prefix_jax.mesh import constrain_tokens, look_up
from prefix_jax.nn.attention import zigzag
from prefix_jax.nn.attention.mask import AttentionMask, MaskAndBias, TokenLayout
from prefix_jax.nn.layers import AttentionInputs, KeysValues
from prefix_jax.nn.remat import Remat, rematerialised
from prefix_jax.prefix import Prefix, Site, StackName

# The sites of one layer: self-attention and cross-attention.
Sites = tuple[Site | None, Site | None]
# (x_BTD, weights, inputs, sites, cache, encoded) → x_BTD and the cache of one layer.
LayerFunction = Callable[..., tuple[jax.Array, KeysValues | None]]


@dataclasses.dataclass(frozen=True)
class Stack:
    """The computation of a stack. Its weights are an argument of every method.

    Attributes:
        arch: the shape and the variant.
        remat: what the backward pass keeps, for stacked weights; see `rematerialised`.
    """

    arch: Architecture
    remat: Remat = "none"

    @property
    def site(self) -> StackName:
        """The name of the stack, and of its self-attention."""
        return "decoder" if self.arch.causal else "encoder"

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """Random float32 weights with stacked layers, without token embeddings."""
        a = self.arch
        rngs = jax.random.split(rng, 3)
        x_BTD = jnp.zeros((1, 1, a.d_model))
        inputs = AttentionInputs(MaskAndBias(jnp.ones((1, 1, 1), bool)))
        heads = jnp.zeros((1, a.kv_heads, 1, a.head_dim))
        encoded = None if a.encoder is None else KeysValues(heads, heads)

        def init_layer(layer_rng: jax.Array) -> Params:
            variables = Layer(a).init(layer_rng, x_BTD, inputs, None, None, inputs, None, encoded)
            params: Params = variables["params"]
            return params

        params: dict[str, Any] = {
            "layers": jax.vmap(init_layer)(jax.random.split(rngs[0], a.layers))
        }
        embed: dict[str, Any] = {}
        E = a.geometry.input_dim
        if a.positions:
            embed["positions_TD"] = normal(rngs[1], a.positions, E)
        if a.token_types:
            # The name is part of the fingerprint of stored prefixes.
            embed["segments_XD"] = normal(rngs[2], a.token_types, E)
        if a.embed_norm:
            embed["norm"] = make_norm(a).init(rng, jnp.zeros((1, 1, E)))["params"]
        if a.embed_dim is not None:
            embed["project_ED"] = normal(rngs[1], E, a.d_model)
            embed["project_bias_D"] = jnp.zeros((a.d_model,))
        if embed:
            params["embed"] = embed
        if a.relative is not None:
            params["relative_RN"] = normal(rngs[1], a.relative.buckets, a.heads)
        if a.final_norm:
            params["final_norm"] = make_norm(a).init(rng, x_BTD)["params"]
        return params

    def embed_positions(
        self, params: Params, x_BTD: jax.Array, layout: TokenLayout, text_position: int
    ) -> jax.Array:
        """Turns token embeddings into the input of the first layer: adds learned positions and
        token types, then applies the embedding's norm and projection.

        Args:
            params: the stack's weights.
            x_BTD: scaled token embeddings, or soft tokens.
            layout: their layout.
            text_position: added to positions.

        Raises:
            ContextError: a position exceeds the table of learned positions. Under `jax.jit`, where
                positions are not known, such tokens become NaN instead.
        """
        a, embed = self.arch, params.get("embed", {})
        dtype = x_BTD.dtype
        if a.positions:
            position_BT = layout.position_BT + text_position
            outside_BT = (position_BT < 0) | (position_BT >= a.max_positions)
            outside_BT &= layout.segment_BT > 0
            if not isinstance(outside_BT, jax.core.Tracer) and outside_BT.any():
                self.check_length(int(jnp.where(layout.segment_BT > 0, position_BT, 0).max()) + 1)
            x_BTD = x_BTD + look_up(embed["positions_TD"], position_BT + a.position_offset)
            x_BTD = jnp.where(outside_BT[..., None], jnp.nan, x_BTD)
        if a.token_types:
            token_type_BT = layout.token_type_BT
            if token_type_BT is None:
                token_type_BT = jnp.zeros_like(layout.segment_BT)
            x_BTD = x_BTD + look_up(embed["segments_XD"], token_type_BT)
        x_BTD = x_BTD.astype(dtype)
        if a.embed_norm:
            normed: Any = make_norm(a).apply({"params": embed["norm"]}, x_BTD)
            x_BTD = normed
        if a.embed_dim is not None:
            x_BTD = x_BTD @ embed["project_ED"] + embed["project_bias_D"]
        return x_BTD

    def check_length(self, length: int) -> None:
        """Raises ContextError if `length` exceeds the table of learned positions.

        Args:
            length: the number of tokens of text, and of positions before them.
        """
        a = self.arch
        if a.positions and length > a.max_positions:
            raise ContextError(
                f"a text that ends at position {length - 1} exceeds the {a.max_positions} learned "
                f"positions of the {self.site} of {a.model_type}; shorten the text or the prefix"
            )

    def final_norm(self, params: Params, h_BTD: jax.Array) -> jax.Array:
        """Applies the norm after the last layer, if there is one."""
        if not self.arch.final_norm:
            return h_BTD
        normed: Any = make_norm(self.arch).apply({"params": params["final_norm"]}, h_BTD)
        h_BTD = normed
        return h_BTD

    def empty_cache(self, dtype: Any, rows: int, columns: int, unstacked: bool) -> Cache:
        """A cache for `rows` rows of up to `columns` tokens."""
        a = self.arch
        shape = (rows, a.kv_heads, columns, a.head_dim)

        def zeros(*leading: int) -> KeysValues:
            return KeysValues(*(jnp.zeros((*leading, *shape), dtype) for _ in range(2)))

        unused = jnp.zeros((rows, columns), jnp.int32)
        return Cache(
            tuple(zeros() for _ in range(a.layers)) if unstacked else zeros(a.layers),
            TokenLayout(unused, unused, unused),
            jnp.zeros((), jnp.int32),
        )

    def run(
        self,
        params: Params,
        x_BTD: jax.Array,
        layout: TokenLayout,
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        lineage_BTS: jax.Array | None = None,
        encoded: Encoded | None = None,
        layer_inputs: bool = False,
    ) -> tuple[jax.Array, Any, Any]:
        """Runs all layers.

        Args:
            params: the stack's weights.
            x_BTD: the input of the first layer.
            layout: the layout of the tokens.
            prefix: the prefix at all layers, or None.
            cache: keys and values of earlier tokens, or None.
            lineage_BTS: True where a query descends from a key, in place of branches.
            encoded: the encoder's output, for cross-attention.
            layer_inputs: whether to return the input of every layer.

        Returns:
            The output of the last layer; the cache with these tokens, or None without a cache; and
            the inputs of the layers, h_LBTD, or None.
        """
        a = self.arch
        # A cache, a lineage and returned layer inputs require columns in their original order, and
        # an encoder has the same work in all columns.
        in_order = cache is not None or lineage_BTS is not None or layer_inputs or not a.causal
        in_zigzag = not in_order and zigzag.applies_to(x_BTD.shape[1])
        if in_zigzag:
            x_BTD, layout = zigzag.permute((x_BTD, layout))
        keys, column, cached = layout, None, None
        if cache is not None:
            column = cache.length
            cached = cache.layout.write(layout, column)
            # A cache with as many columns as there are tokens holds only these tokens.
            keys = layout if cached.segment_BT.shape == layout.segment_BT.shape else cached
        unstacked = isinstance(params["layers"], tuple)
        kinds = set(a.sliding) or {False}
        inputs = {
            sliding: attention_inputs(
                a,
                params,
                layout,
                keys,
                prefix,
                sliding=sliding,
                mixed=len(kinds) == 2 and not unstacked,
                column=column,
                lineage_BTS=lineage_BTS,
                in_zigzag=in_zigzag,
            )
            for sliding in kinds
        }
        sites: Sites = (None, None)
        if prefix is not None:
            # Cross-attention belongs to the decoder; an encoder may have another number of layers.
            sites = (getattr(prefix, self.site), None if a.encoder is None else prefix.cross)
        cross_inputs = None
        if encoded is not None:
            mask = AttentionMask(layout, encoded.layout, causal=False)
            cross_inputs = AttentionInputs(MaskAndBias(mask))

        def layer(
            x_BTD: jax.Array,
            weights: Params,
            inputs: AttentionInputs,
            sites: Sites,
            cache: KeysValues | None,
            encoded: KeysValues | None,
        ) -> tuple[jax.Array, KeysValues | None]:
            out: Any = Layer(a).apply(
                {"params": weights}, x_BTD, inputs, sites[0], cache, cross_inputs, sites[1], encoded
            )
            return constrain_tokens(out[0]), out[1]

        per_layer = (
            params["layers"],
            sites,
            None if cache is None else cache.layers,
            None if encoded is None else encoded.layers,
        )
        loop = self._loop if unstacked else self._scan
        x_BTD, caches, h_LBTD = loop(layer, x_BTD, inputs, per_layer, layer_inputs)
        if cache is not None and cached is not None:
            cache = Cache(caches, cached, cache.length + x_BTD.shape[1])
        if in_zigzag:
            x_BTD = zigzag.restore(x_BTD)
        return x_BTD, cache, h_LBTD

    def _loop(
        self,
        layer: LayerFunction,
        x_BTD: jax.Array,
        inputs: dict[bool, AttentionInputs],
        per_layer: Any,
        layer_inputs: bool,
    ) -> tuple[jax.Array, Any, jax.Array | None]:
        """Runs unstacked layers in a Python loop."""
        layers, sites, caches, encoded = per_layer
        states, new_caches = [], []
        for index, weights in enumerate(layers):
            states.append(x_BTD)
            x_BTD, new_cache = layer(
                x_BTD,
                weights,
                inputs[self.arch.sliding[index] if self.arch.sliding else False],
                jax.tree.map(operator.itemgetter(index), sites),
                caches[index] if caches else None,
                encoded[index] if encoded else None,
            )
            new_caches.append(new_cache)
        return x_BTD, tuple(new_caches), jnp.stack(states) if layer_inputs else None

    def _scan(
        self,
        layer: LayerFunction,
        x_BTD: jax.Array,
        inputs: dict[bool, AttentionInputs],
        per_layer: Any,
        layer_inputs: bool,
    ) -> tuple[jax.Array, Any, jax.Array | None]:
        """Runs stacked layers in one `jax.lax.scan`."""

        def select(kind: Any) -> AttentionInputs:
            """The inputs of a layer's kind; the kinds have equal static values."""
            if len(inputs) == 1:
                return next(iter(inputs.values()))
            selected: AttentionInputs = jax.tree.map(
                lambda wide, narrow: wide if wide is narrow else jnp.where(kind, narrow, wide),
                inputs[False],
                inputs[True],
            )
            return selected

        def body(x_BTD: jax.Array, layer_and_kind: Any) -> tuple[jax.Array, Any]:
            (weights, sites, cache, encoded), sliding = layer_and_kind
            y_BTD, cache = layer(x_BTD, weights, select(sliding), sites, cache, encoded)
            return y_BTD, (x_BTD if layer_inputs else None, cache)

        sliding_L = jnp.array(self.arch.sliding) if self.arch.sliding else None
        x_BTD, (h_LBTD, caches) = jax.lax.scan(
            rematerialised(body, self.remat), x_BTD, (per_layer, sliding_L)
        )
        return x_BTD, caches, h_LBTD

    def map_layers(self, params: Params, method: Callable[..., Any], *per_layer: Any) -> Any:
        """Calls a method of `Layer` in every layer and stacks the results.

        Args:
            params: the stack's weights.
            method: called with one element of each of `per_layer`.
            per_layer: arrays with a leading L axis.
        """

        def call(weights_args: Any) -> Any:
            weights, args = weights_args
            return Layer(self.arch).apply({"params": weights}, *args, method=method)

        if isinstance(params["layers"], tuple):
            return stack_layers(
                [
                    call((weights, jax.tree.map(operator.itemgetter(index), per_layer)))
                    for index, weights in enumerate(params["layers"])
                ]
            )
        return jax.lax.map(call, (params["layers"], per_layer))

    def keys_values(self, params: Params, h_LBTD: jax.Array, layout: TokenLayout) -> KeysValues:
        """Keys and values of the inputs of every layer, [L, B, K, T, H]."""
        kinds = self.arch.sliding or (False,) * self.arch.layers
        angles = stack_layers(
            [rotary_angles(self.arch, layout.position_BT, sliding) for sliding in kinds]
        )
        layers: KeysValues = self.map_layers(params, Layer.keys_values, h_LBTD, angles)
        return layers


def normal(rng: jax.Array, *shape: int) -> jax.Array:
    """A random weight."""
    return 0.02 * jax.random.normal(rng, shape)
