"""A frozen decoder-only transformer that reads prefixes.

Layer weights come in one of two forms, and every method takes either:

    stacked   one tree whose leaves have a leading L axis. The layers are one `lax.scan`, so that
              compile time does not grow with depth: the form for training.
    listed    a tuple of L trees. The layers are a Python loop, so that no step copies a layer
              out of the stack: the form for decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import flax.struct
import jax
import jax.numpy as jnp

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.layer import NORMS, Layer
from prefix_jax.mesh import constrain_rows, gather_columns
from prefix_jax.nn.layers import KeysValues, View
from prefix_jax.nn.mask import Tokens, visible, visible_prefix
from prefix_jax.prefix import Embeds, Geometry, Hidden, KVPrefix, Prefix, Produced, Site

Params = Mapping[str, Any]
Remat = Literal["none", "dots", "full"]

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


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
    tokens: Tokens
    length: jax.Array

    def grow(self, columns: int) -> Cache:
        """The same with room for so many more columns."""

        def pad(axis: int) -> Callable[[jax.Array], jax.Array]:
            return lambda x: jnp.pad(
                x, [(0, columns if i == x.ndim + axis else 0) for i in range(x.ndim)]
            )

        layers, tokens = jax.tree.map(pad(-2), self.layers), jax.tree.map(pad(-1), self.tokens)
        return Cache(layers, tokens, self.length)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The computation of a decoder. Its weights are an argument of every method.

    Attributes:
        arch: its shape and variant.
        remat: what the backward pass computes again, in the stacked form: nothing ("none"), all
            but the outputs of weight matrices ("dots"), or whole layers ("full").
    """

    arch: Architecture
    remat: Remat = "none"

    @property
    def geometry(self) -> Geometry:
        """The part of the shape that a prefix has to match."""
        return self.arch.geometry

    # Weights.

    def init(self, rng: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> Params:
        """Random weights, stacked. Under `jax.eval_shape`, the abstract tree to load into."""
        a = self.arch
        rngs = jax.random.split(rng, 4)
        x_BTD, tokens = jnp.zeros((1, 1, a.d_model)), Tokens.plain(jnp.ones((1, 1), bool))
        view = self._view(tokens, tokens, None, None, None)

        def init_layer(layer_rng: jax.Array) -> Params:
            return Layer(a).init(layer_rng, x_BTD, view, None, None)["params"]

        def normal(key: jax.Array, *shape: int) -> jax.Array:
            return 0.02 * jax.random.normal(key, shape)

        params: dict[str, Any] = {
            "embed": {"tokens_VD": normal(rngs[0], a.vocab, a.d_model)},
            "layers": jax.vmap(init_layer)(jax.random.split(rngs[1], a.layers)),
            "final_norm": NORMS[a.norm](a.epsilon).init(rng, x_BTD)["params"],
        }
        if a.rotary is None:
            params["embed"]["positions_TD"] = normal(rngs[2], a.max_positions, a.d_model)
        if not a.tied:
            params["head"] = {"unembed_DV": normal(rngs[3], a.d_model, a.vocab)}
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def listed(self, params: Params) -> Params:
        """The weights with their layers in a tuple.

        Leaf by leaf, each one freed once it is converted, so that no machine holds a large model
        twice: `params["layers"]` cannot be used afterwards.
        """
        if isinstance(params["layers"], tuple):
            return params
        stacked, treedef = jax.tree.flatten(params["layers"])
        split = jax.jit(lambda leaf: tuple(leaf[layer] for layer in range(self.arch.layers)))
        columns = []
        for leaf in stacked:
            columns.append(jax.block_until_ready(split(leaf)))
            leaf.delete()
        layers = tuple(jax.tree.unflatten(treedef, leaves) for leaves in zip(*columns, strict=True))
        return {**params, "layers": layers}

    def stacked(self, params: Params) -> Params:
        """The weights with their layers stacked: undoes `listed`, in the same way."""
        if not isinstance(params["layers"], tuple):
            return params
        treedef = jax.tree.structure(params["layers"][0])
        columns = zip(*(jax.tree.leaves(layer) for layer in params["layers"]), strict=True)
        stack = jax.jit(lambda *leaves: jnp.stack(leaves))
        stacked = []
        for leaves in columns:
            stacked.append(jax.block_until_ready(stack(*leaves)))
            for leaf in leaves:
                leaf.delete()
        return {**params, "layers": jax.tree.unflatten(treedef, stacked)}

    # Prefixes.

    def lift(self, params: Params, produced: Produced | None) -> Prefix | None:
        """Turns what a method produced into the prefix that attention reads. Differentiable.

        Hidden states get their keys and values from each layer's frozen norm and projections.
        Soft tokens run once through the frozen model, as one row of P: on a causal model that
        equals prepending them to every row, and costs less. Both stand at positions 0 to P - 1,
        and text follows at P.
        """
        if produced is None or isinstance(produced, Prefix):
            return produced
        if isinstance(produced, Embeds):
            tokens = Tokens.plain(jnp.ones((1, produced.x_PD.shape[0]), bool))
            x_BTD = self._place(params, produced.x_PD[None], tokens.position_BT)
            return _as_prefix(self._read(params, x_BTD, tokens)[0])

        tokens = Tokens.plain(jnp.ones((1, produced.h_LPD.shape[1]), bool))
        view = self._view(tokens, tokens, None, None, None)
        h_LBPD = produced.h_LPD[:, None].astype(_dtype(params))

        def keys_values(weights_h: tuple[Params, jax.Array]) -> KeysValues:
            weights, h_BPD = weights_h
            made: Any = Layer(self.arch).apply(
                {"params": weights}, h_BPD, view, method=Layer.keys_values
            )
            return KeysValues.of(*made)

        if isinstance(params["layers"], tuple):
            pairs = zip(params["layers"], h_LBPD, strict=True)
            layers = _stack([keys_values(pair) for pair in pairs])
        else:
            layers = jax.lax.map(keys_values, (params["layers"], h_LBPD))
        return _as_prefix(layers)

    def read(self, params: Params, ids_P: jax.Array) -> tuple[Embeds, Hidden, Prefix]:
        """What a text leaves at the input embeddings, at the entry of every layer, and as keys
        and values: the three forms from which a prefix can start. All float32."""
        tokens = Tokens.plain(jnp.ones((1, len(ids_P)), bool))
        x_BTD = params["embed"]["tokens_VD"][ids_P][None]
        layers, h_LBTD = self._read(params, self._place(params, x_BTD, tokens.position_BT), tokens)
        prefix = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), _as_prefix(layers))
        return (
            Embeds(x_BTD[0].astype(jnp.float32)),
            Hidden(h_LBTD[:, 0].astype(jnp.float32)),
            prefix,
        )

    def _read(
        self, params: Params, x_BTD: jax.Array, tokens: Tokens
    ) -> tuple[KeysValues, jax.Array]:
        """Stacked keys and values of one bare forward pass, and the states that entered layers."""
        cache = self.empty_cache(params, *x_BTD.shape[:2])
        _, cache, h_LBTD = self._run(params, x_BTD, tokens, None, cache, entries=True)
        layers = _stack(cache.layers) if isinstance(cache.layers, tuple) else cache.layers
        return layers, h_LBTD

    # The forward pass.

    def empty_cache(self, params: Params, rows: int, columns: int) -> Cache:
        """A cache for `rows` rows of up to `columns` tokens, in the dtype of the weights."""
        a = self.arch
        shape = (rows, a.kv_heads, columns, a.head_dim)

        def zeros(*leading: int) -> KeysValues:
            return KeysValues(*(jnp.zeros((*leading, *shape), _dtype(params)) for _ in range(2)))

        listed = isinstance(params["layers"], tuple)
        nowhere = jnp.zeros((rows, columns), jnp.int32)
        return Cache(
            tuple(zeros() for _ in range(a.layers)) if listed else zeros(a.layers),
            Tokens(nowhere, nowhere, nowhere),
            jnp.zeros((), jnp.int32),
        )

    @overload
    def hidden(
        self,
        params: Params,
        ids_BT: jax.Array,
        tokens: Tokens,
        prefix: Prefix | None = None,
        cache: None = None,
        lineage_BTS: jax.Array | None = None,
    ) -> tuple[jax.Array, None]: ...

    @overload
    def hidden(
        self,
        params: Params,
        ids_BT: jax.Array,
        tokens: Tokens,
        prefix: Prefix | None,
        cache: Cache,
        lineage_BTS: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]: ...

    def hidden(
        self,
        params: Params,
        ids_BT: jax.Array,
        tokens: Tokens,
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        lineage_BTS: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs tokens through the model.

        Args:
            params: the weights, stacked or listed.
            ids_BT: token ids.
            tokens: where each stands; positions count from 0, the prefix's offset is added here.
            prefix: what every layer attends to besides; None is the bare model.
            cache: keys and values of earlier tokens, with room for T more columns.
            lineage_BTS: which keys each token descends from, in place of its branch.

        Returns:
            h_BTD after the final norm, and the cache with these tokens in it.
        """
        offset = 0 if prefix is None else prefix.offset
        x_BTD = gather_columns(params["embed"]["tokens_VD"])[ids_BT]
        x_BTD = self._place(params, x_BTD, tokens.position_BT + offset)
        h_BTD, cache, _ = self._run(params, x_BTD, tokens, prefix, cache, lineage_BTS)
        norm = NORMS[self.arch.norm](self.arch.epsilon)
        normed_BTD: Any = norm.apply({"params": params["final_norm"]}, h_BTD)
        return normed_BTD, cache

    def unembed(self, params: Params, h_BTD: jax.Array) -> jax.Array:
        """logits_BTV in float32. Ask only where there is a target: V is large."""
        if self.arch.tied:
            spec, weight = "...D,VD->...V", params["embed"]["tokens_VD"]
        else:
            spec, weight = "...D,DV->...V", params["head"]["unembed_DV"]
        return jnp.einsum(spec, h_BTD, weight, preferred_element_type=jnp.float32)

    def _place(self, params: Params, x_BTD: jax.Array, position_BT: jax.Array) -> jax.Array:
        """Embeddings at their positions, in the dtype of the weights."""
        if self.arch.rotary is None:
            x_BTD = x_BTD + params["embed"]["positions_TD"][position_BT]
        return x_BTD.astype(_dtype(params))

    def _run(
        self,
        params: Params,
        x_BTD: jax.Array,
        tokens: Tokens,
        prefix: Prefix | None,
        cache: Cache | None,
        lineage_BTS: jax.Array | None = None,
        entries: bool = False,
    ) -> tuple[jax.Array, Any, Any]:
        """All layers. Returns their output, the cache if there is one, and with `entries` the
        states that entered each of them, h_LBTD."""
        a = self.arch
        keys, column = tokens, None
        if cache is not None:
            column = cache.length
            keys = jax.tree.map(
                lambda old_BS, new_BT: jax.lax.dynamic_update_slice(old_BS, new_BT, (0, column)),
                cache.tokens,
                tokens,
            )
        join = None if prefix is None else prefix.decoder.join
        views = {
            sliding: self._view(
                tokens, keys, prefix, column, a.window if sliding else None, lineage_BTS
            )
            for sliding in set(a.sliding) or {False}
        }

        def layer(
            x_BTD: jax.Array,
            weights: Params,
            view: View,
            join: KVPrefix | None,
            cache: KeysValues | None,
        ) -> tuple[jax.Array, KeysValues | None]:
            out: Any = Layer(a).apply({"params": weights}, x_BTD, view, join, cache)
            return constrain_rows(out[0]), out[1]

        caches: Any = None if cache is None else cache.layers
        if isinstance(params["layers"], tuple):
            states, written = [], []
            for index, weights in enumerate(params["layers"]):
                states.append(x_BTD)
                view = views[a.sliding[index] if a.sliding else False]
                join_layer = jax.tree.map(lambda leaf: leaf[index], join)  # noqa: B023
                x_BTD, cache_layer = layer(
                    x_BTD, weights, view, join_layer, caches[index] if caches else None
                )
                written.append(cache_layer)
            h_LBTD, caches = jnp.stack(states) if entries else None, tuple(written)
        else:

            def body(x_BTD: jax.Array, per_layer: Any) -> tuple[jax.Array, Any]:
                weights, sliding, join, cache = per_layer
                if len(views) == 2:
                    view = jax.tree.map(
                        lambda wide, narrow: jnp.where(sliding, narrow, wide),
                        views[False],
                        views[True],
                    )
                else:
                    (view,) = views.values()
                y_BTD, cache = layer(x_BTD, weights, view, join, cache)
                return y_BTD, (x_BTD if entries else None, cache)

            if self.remat != "none":
                body = jax.checkpoint(body, policy=_REMAT_POLICIES[self.remat], prevent_cse=False)
            sliding_L = jnp.array(a.sliding) if a.sliding else None
            x_BTD, (h_LBTD, caches) = jax.lax.scan(
                body, x_BTD, (params["layers"], sliding_L, join, caches)
            )
        if cache is not None:
            cache = Cache(caches, keys, cache.length + x_BTD.shape[1])
        return x_BTD, cache, h_LBTD

    def _view(
        self,
        queries: Tokens,
        keys: Tokens,
        prefix: Prefix | None,
        column: jax.Array | None,
        window: int | None,
        lineage_BTS: jax.Array | None = None,
    ) -> View:
        """What layers with this window see."""
        position_BT = queries.position_BT + (0 if prefix is None else prefix.offset)
        mask_BTP = rotary = None
        if prefix is not None and self.arch.window is not None and not prefix.pinned:
            mask_BTP = visible_prefix(position_BT, prefix.length, window)
        if self.arch.rotary is not None:
            rotary = self.arch.rotary.angles(position_BT, self.arch.head_dim)
        mask_BTS = visible(queries, keys, window, lineage_BTS)
        return View(mask_BTS, mask_BTP, rotary, column)


def _dtype(params: Params) -> jax.typing.DTypeLike:
    return params["embed"]["tokens_VD"].dtype


def _stack(layers: Any) -> KeysValues:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def _as_prefix(layers: KeysValues) -> Prefix:
    """The keys and values of one row, [L, 1, K, P, H], as a prefix before text."""
    join = KVPrefix(layers.k_BKSH[:, 0].swapaxes(1, 2), layers.v_BKSH[:, 0].swapaxes(1, 2))
    return Prefix(Site(join), offset=join.length)
