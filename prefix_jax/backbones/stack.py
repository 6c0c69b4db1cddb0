"""A stack of frozen transformer layers that reads prefixes: a decoder, or an encoder.

Layer weights are stacked or unstacked (`stacking`), and everything here takes either.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.layer import Layer, make_norm
from prefix_jax.backbones.stacking import Params, stack_layers
from prefix_jax.errors import ContextError, PrefixError
from prefix_jax.mesh import constrain_tokens, look_up
from prefix_jax.nn.attention import zigzag
from prefix_jax.nn.attention.mask import (
    AttentionMask,
    MaskAndBias,
    TokenLayout,
    causal_mask,
    prefix_mask,
)
from prefix_jax.nn.layers import KeysValues, LayerInputs
from prefix_jax.nn.remat import Remat, rematerialised
from prefix_jax.prefix import Prefix, Site, StackName


@flax.struct.dataclass
class Encoded:
    """What a decoder attends to of its encoder.

    Attributes:
        layers: keys and values for every layer of the decoder: a tuple of L `KeysValues`, or one
            whose arrays have a leading L axis, like the weights that it is used with.
        tokens: where the tokens stand that the encoder read, [B, S].
    """

    layers: KeysValues | tuple[KeysValues, ...]
    layout: TokenLayout


@flax.struct.dataclass
class Cache:
    """What a decoder remembers of the tokens that it has read.

    Attributes:
        layers: a tuple of L `KeysValues`, or one whose arrays have a leading L axis, like the
            weights that it is used with.
        tokens: where the cached tokens stand, [B, S]; group 0 marks an unused column.
        length: int32 scalar, the number of columns in use.
    """

    layers: KeysValues | tuple[KeysValues, ...]
    layout: TokenLayout
    length: jax.Array

    def grow(self, columns: int) -> Cache:
        """The same with room for so many more columns."""

        def pad(axis: int) -> Callable[[jax.Array], jax.Array]:
            return lambda x: jnp.pad(
                x, [(0, columns if i == x.ndim + axis else 0) for i in range(x.ndim)]
            )

        layers, tokens = jax.tree.map(pad(-2), self.layers), jax.tree.map(pad(-1), self.layout)
        return Cache(layers, tokens, self.length)


@dataclasses.dataclass(frozen=True)
class Stack:
    """The computation of a stack. Its weights are an argument of every method.

    Attributes:
        arch: its shape and variant.
        remat: what the backward pass keeps, in the stacked form: see `rematerialised`.
    """

    arch: Architecture
    remat: Remat = "none"

    @property
    def site(self) -> StackName:
        """The name of its self-attention."""
        return "decoder" if self.arch.causal else "encoder"

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """Random weights, stacked, float32; without the token embeddings."""
        a = self.arch
        rngs = jax.random.split(rng, 3)
        x_BTD = jnp.zeros((1, 1, a.d_model))
        view = LayerInputs(MaskAndBias(jnp.ones((1, 1, 1), bool)))
        heads = jnp.zeros((1, a.kv_heads, 1, a.head_dim))
        memory = None if a.encoder is None else KeysValues(heads, heads)

        def init_layer(layer_rng: jax.Array) -> Params:
            variables = Layer(a).init(layer_rng, x_BTD, view, None, None, view, None, memory)
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

    def place(self, params: Params, x_BTD: jax.Array, tokens: TokenLayout, start: int) -> jax.Array:
        """Embeddings at their positions, as the first layer reads them.

        Args:
            params: the stack's weights.
            x_BTD: token embeddings, scaled, or soft tokens.
            tokens: where they stand.
            start: added to positions.

        Raises:
            ContextError: a position is not in the table of learned positions. Inside of a jitted
                function, whose positions are not known yet, such tokens become NaN.
        """
        a, embed = self.arch, params.get("embed", {})
        dtype = x_BTD.dtype
        if a.positions:
            position_BT = tokens.position_BT + start
            outside_BT = (position_BT < 0) | (position_BT >= a.max_positions)
            outside_BT &= tokens.segment_BT > 0
            if not isinstance(outside_BT, jax.core.Tracer) and outside_BT.any():
                self.check_length(int(jnp.where(tokens.segment_BT > 0, position_BT, 0).max()) + 1)
            x_BTD = x_BTD + look_up(embed["positions_TD"], position_BT + a.position_offset)
            x_BTD = jnp.where(outside_BT[..., None], jnp.nan, x_BTD)
        if a.token_types:
            token_type_BT = tokens.token_type_BT
            if token_type_BT is None:
                token_type_BT = jnp.zeros_like(tokens.segment_BT)
            x_BTD = x_BTD + look_up(embed["segments_XD"], token_type_BT)
        x_BTD = x_BTD.astype(dtype)
        if a.embed_norm:
            normed: Any = make_norm(a).apply({"params": embed["norm"]}, x_BTD)
            x_BTD = normed
        if a.embed_dim is not None:
            x_BTD = x_BTD @ embed["project_ED"] + embed["project_bias_D"]
        return x_BTD

    def check_length(self, length: int) -> None:
        """Raises ContextError if the table of learned positions is shorter than a text.

        Args:
            length: tokens of the text, and the positions before them.
        """
        a = self.arch
        if a.positions and length > a.max_positions:
            raise ContextError(
                f"a text that ends at position {length - 1} exceeds the {a.max_positions} learned "
                f"positions of the {self.site} of {a.model_type}; shorten the text or the prefix"
            )

    def finish(self, params: Params, h_BTD: jax.Array) -> jax.Array:
        """The norm after the last layer."""
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

        nowhere = jnp.zeros((rows, columns), jnp.int32)
        return Cache(
            tuple(zeros() for _ in range(a.layers)) if unstacked else zeros(a.layers),
            TokenLayout(nowhere, nowhere, nowhere),
            jnp.zeros((), jnp.int32),
        )

    def run(
        self,
        params: Params,
        x_BTD: jax.Array,
        tokens: TokenLayout,
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        lineage_BTS: jax.Array | None = None,
        encoded: Encoded | None = None,
        entries: bool = False,
    ) -> tuple[jax.Array, Any, Any]:
        """All layers. Returns their output, the cache if there is one, and with `entries` the
        states that entered each of them, h_LBTD."""
        a = self.arch
        # A cache, a lineage and the states that entered layers have their columns in order, and an
        # encoder has the same work for all of them.
        in_order = cache is not None or lineage_BTS is not None or entries or not a.causal
        in_zigzag = not in_order and zigzag.applies_to(x_BTD.shape[1])
        if in_zigzag:
            x_BTD, tokens = zigzag.permute((x_BTD, tokens))
        keys, column, there = tokens, None, None
        if cache is not None:
            column = cache.length
            there = cache.layout.write(tokens, column)
            # A cache of as many columns as there are tokens holds these tokens and nothing else.
            keys = tokens if there.segment_BT.shape == tokens.segment_BT.shape else there
        kinds = set(a.sliding) or {False}
        # The layers of one scan are of one kind as far as anything static goes.
        mixed = len(kinds) == 2 and not isinstance(params["layers"], tuple)
        views = {
            sliding: self._view(
                params, tokens, keys, prefix, column, sliding, mixed, lineage_BTS, in_zigzag
            )
            for sliding in kinds
        }
        sites: tuple[Site | None, Site | None] = (None, None)
        if prefix is not None:
            # An encoder has other layers than the decoder, whose the cross-attention is.
            cross = None if a.encoder is None else prefix.cross
            sites = (getattr(prefix, self.site), cross)
        cross_view = None
        if encoded is not None:
            cross_view = LayerInputs(
                MaskAndBias(AttentionMask(tokens, encoded.layout, causal=False))
            )

        def layer(
            x_BTD: jax.Array,
            weights: Params,
            view: LayerInputs,
            sites: tuple[Site | None, Site | None],
            cache: KeysValues | None,
            memory: KeysValues | None,
        ) -> tuple[jax.Array, KeysValues | None]:
            out: Any = Layer(a).apply(
                {"params": weights}, x_BTD, view, sites[0], cache, cross_view, sites[1], memory
            )
            return constrain_tokens(out[0]), out[1]

        caches: Any = None if cache is None else cache.layers
        memories: Any = None if encoded is None else encoded.layers
        if isinstance(params["layers"], tuple):
            states, written = [], []
            for index, weights in enumerate(params["layers"]):
                states.append(x_BTD)
                view = views[a.sliding[index] if a.sliding else False]
                sites_here = jax.tree.map(operator.itemgetter(index), sites)
                x_BTD, cache_layer = layer(
                    x_BTD,
                    weights,
                    view,
                    sites_here,
                    caches[index] if caches else None,
                    memories[index] if memories else None,
                )
                written.append(cache_layer)
            h_LBTD, caches = jnp.stack(states) if entries else None, tuple(written)
        else:

            def body(x_BTD: jax.Array, per_layer: Any) -> tuple[jax.Array, Any]:
                weights, sliding, sites, cache, memory = per_layer
                if mixed:
                    view = jax.tree.map(
                        lambda wide, narrow: (
                            wide if wide is narrow else jnp.where(sliding, narrow, wide)
                        ),
                        views[False],
                        views[True],
                    )
                else:
                    (view,) = views.values()
                y_BTD, cache = layer(x_BTD, weights, view, sites, cache, memory)
                return y_BTD, (x_BTD if entries else None, cache)

            sliding_L = jnp.array(a.sliding) if a.sliding else None
            x_BTD, (h_LBTD, caches) = jax.lax.scan(
                rematerialised(body, self.remat),
                x_BTD,
                (params["layers"], sliding_L, sites, caches, memories),
            )
        if cache is not None and there is not None:
            cache = Cache(caches, there, cache.length + x_BTD.shape[1])
        if in_zigzag:
            x_BTD = zigzag.restore(x_BTD)
        return x_BTD, cache, h_LBTD

    def over_layers(self, params: Params, method: Callable[..., Any], *per_layer: Any) -> Any:
        """A method of `Layer` for every layer, with stacked results.

        Args:
            params: the stack's weights, stacked or unstacked.
            method: of `Layer`, called with one element of each of `per_layer`.
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

    def keys_values(self, params: Params, h_LBTD: jax.Array, tokens: TokenLayout) -> KeysValues:
        """The keys and values of hidden states at the entry of every layer, [L, B, K, T, H]."""
        kinds = self.arch.sliding or (False,) * self.arch.layers
        angles = stack_layers([self._angles(tokens.position_BT, kind) for kind in kinds])
        made: KeysValues = self.over_layers(params, Layer.keys_values, h_LBTD, angles)
        return made

    def _angles(self, position_BT: jax.Array, sliding: bool) -> tuple[jax.Array, jax.Array] | None:
        """Rotary angles at positions, in layers of this kind; None where nothing turns."""
        a = self.arch
        rotary = a.sliding_rotary if sliding and a.sliding_rotary else a.rotary
        return None if rotary is None else rotary.angles(position_BT, a.head_dim)

    def _view(
        self,
        params: Params,
        queries: TokenLayout,
        keys: TokenLayout,
        prefix: Prefix | None,
        column: jax.Array | None,
        sliding: bool,
        mixed: bool,
        lineage_BTS: jax.Array | None,
        in_zigzag: bool,
    ) -> LayerInputs:
        """What layers of this kind see; `mixed` if it is to be chosen layer by layer in a scan."""
        a = self.arch
        window = a.window if sliding else None
        site = None if prefix is None else getattr(prefix, self.site)
        slots = 0 if site is None else site.length
        start = 0 if prefix is None else prefix.text_position_in(self.site)
        position_BT = queries.position_BT + start
        if lineage_BTS is not None:
            seen = MaskAndBias(causal_mask(queries, keys, window, lineage_BTS))
        elif mixed:
            narrow = jnp.asarray(sliding)
            seen = MaskAndBias(
                AttentionMask(queries, keys, a.causal, a.window, narrow, zigzag=in_zigzag)
            )
        else:
            seen = MaskAndBias(AttentionMask(queries, keys, a.causal, window, zigzag=in_zigzag))
        tasks = 1 if prefix is None or prefix.tasks is None else prefix.tasks
        slot_P = jnp.arange(slots) % max(slots // tasks, 1)
        if slots and prefix is not None and a.window is not None and not prefix.pinned:
            mask_BTP = prefix_mask(position_BT, slot_P, window)
            seen = dataclasses.replace(seen, mask_BTP=mask_BTP)
        if slots and prefix is not None and prefix.tasks is not None:
            own_BTP = task_of(queries)[:, :, None] == jnp.arange(slots) // (slots // tasks)
            mask_BTP = own_BTP if seen.mask_BTP is None else own_BTP & seen.mask_BTP
            seen = dataclasses.replace(seen, mask_BTP=mask_BTP)
        if a.relative is not None:
            table_RN = params["relative_RN"]
            bias_BNTS = a.relative.bias(table_RN, position_BT, keys.position_BT + start)
            seen = dataclasses.replace(seen, bias_BNTS=bias_BNTS)
            if slots:
                bias_BNTP = a.relative.bias(table_RN, position_BT, slot_P[None])
                seen = dataclasses.replace(seen, bias_BNTP=bias_BNTP)
        return LayerInputs(seen, self._angles(position_BT, sliding), column)


def task_of(tokens: TokenLayout) -> jax.Array:
    """task_BT, where a bank has prefixes for several.

    Raises:
        PrefixError: tokens do not say whose they are.
    """
    if tokens.task_BT is None:
        raise PrefixError(
            "the prefix is a bank of several tasks, and the tokens do not say whose they are: take "
            "the prefix of one task, or give TokenLayout.task_BT"
        )
    return tokens.task_BT


def normal(rng: jax.Array, *shape: int) -> jax.Array:
    """A random weight."""
    return 0.02 * jax.random.normal(rng, shape)
