"""A frozen transformer that reads prefixes: a decoder, an encoder, or both together."""

from __future__ import annotations

import dataclasses
from typing import Any, overload

import jax
import jax.numpy as jnp

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.layer import Layer
from prefix_jax.backbones.sites import complete, site_of, slots_of
from prefix_jax.backbones.soft import prepend
from prefix_jax.backbones.stack import Cache, Encoded, Stack, normal
from prefix_jax.backbones.stacking import Params, as_stacked, pick_layers, to_stacked, to_unstacked
from prefix_jax.errors import BackboneError, PrefixError
from prefix_jax.nn import vocabulary
from prefix_jax.nn.attention import zigzag
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.nn.layers import KeysValues
from prefix_jax.nn.quantized import Weight, matmul, take
from prefix_jax.nn.remat import Remat
from prefix_jax.prefix import (
    Adapter,
    Embeds,
    Gated,
    Geometry,
    Hidden,
    Prefix,
    Produced,
    Site,
    SiteName,
    StackName,
)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The computation of a transformer. Its weights are an argument of every method, and come in
    one of the two forms of `Stack`.

    Attributes:
        arch: its shape and variant.
        remat: what the backward pass keeps: see `nn.remat`.
    """

    arch: Architecture
    remat: Remat = "none"

    @property
    def geometry(self) -> Geometry:
        """The part of the shape that a prefix has to match."""
        return self.arch.geometry

    @property
    def _stack(self) -> Stack:
        """The stack that a head reads: the decoder, or an encoder that stands alone."""
        return Stack(self.arch, self.remat)

    @property
    def _encoder(self) -> Stack:
        if self.arch.encoder is None:
            raise BackboneError(f"{self.arch.model_type} is a single stack: it encodes no source")
        return Stack(self.arch.encoder, self.remat)

    @property
    def reader(self) -> StackName:
        """The stack that reads the text that is given."""
        return self._stack.site if self.arch.encoder is None else "encoder"

    def room(self, prefix: Prefix | None, stack: StackName) -> int:
        """How many tokens of text the positions of a stack leave beside a prefix."""
        two_sided = self.arch.encoder is not None and stack == "encoder"
        arch = self._encoder.arch if two_sided else self.arch
        if prefix is None:
            return arch.max_positions
        soft = prefix.soft_tokens if stack == "encoder" else 0
        return arch.max_positions - prefix.text_position_in(stack) - soft

    # Weights.

    def init(self, rng: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> Params:
        """Random weights, stacked. Under `jax.eval_shape`, the abstract tree to load into."""
        a = self.arch
        rngs = jax.random.split(rng, 4)
        params = self._stack.init(rngs[0])
        tokens_VD = normal(rngs[1], a.vocab, a.geometry.input_dim)
        params["embed"] = {"tokens_VD": tokens_VD, **params.get("embed", {})}
        if a.encoder is not None:
            params["encoder"] = self._encoder.init(rngs[2])
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
        """The weights with their layers in a tuple; what they were before is freed."""
        params = to_unstacked(params)
        if self.arch.encoder is not None:
            params = {**params, "encoder": to_unstacked(params["encoder"])}
        return params

    def stacked(self, params: Params) -> Params:
        """The weights with their layers stacked: undoes `unstacked`, in the same way."""
        params = to_stacked(params)
        if self.arch.encoder is not None:
            params = {**params, "encoder": to_stacked(params["encoder"])}
        return params

    # Prefixes.

    def lift(self, params: Params, produced: Produced | None) -> Prefix | None:
        """Turns what a method produced into the prefix that attention reads. Differentiable.

        Hidden states get their keys and values from each layer's frozen norm and projections, an
        adapter's states from the projections alone. Soft tokens before a decoder run once through
        the frozen model, as one row of P (of a bank, A rows): that equals prepending them to every
        row, and costs less. Both stand at positions 0 to P - 1, and text follows at P. Soft tokens
        before an encoder stay what they are. A site of some layers gets the others, where it does
        nothing.

        Raises:
            PrefixError: the model has no such site.
            ContextError: there are more soft tokens than learned positions.
        """
        if produced is None:
            return None
        stack, site = self._stack, self._stack.site
        if isinstance(produced, Prefix):
            return complete(produced, self.geometry.sites)
        if isinstance(produced, Embeds):
            if self.arch.encoder is not None or not self.arch.causal:
                return Prefix(embeds_PD=produced.x_PD, tasks=produced.tasks)
            # The prompts of a bank are rows of one batch, which do not see each other.
            x_BTD = jnp.stack([alone.x_PD for alone in produced.split_tasks()]).astype(
                _dtype(params)
            )
            stack.check_length(x_BTD.shape[1])
            tokens = TokenLayout.plain(jnp.ones(x_BTD.shape[:2], bool))
            x_BTD = stack.place(params, x_BTD, tokens, 0)
            layers, _ = self._read(params, x_BTD, tokens)
            return Prefix(
                decoder=site_of(layers), text_position=x_BTD.shape[1], tasks=produced.tasks
            )
        if isinstance(produced, Adapter):
            h_L1PD = produced.h_LPD[:, None].astype(_dtype(params))
            weights = pick_layers(params, produced.layers)
            made = stack.over_layers(weights, Layer.adapter_keys_values, h_L1PD)
            k_LPKH, v_LPKH = slots_of(made)
            heads = (len(produced.gate_LN), self.arch.heads)
            gated = Gated(k_LPKH, v_LPKH, jnp.broadcast_to(produced.gate_LN, heads))
            adapter = Prefix.of({site: Site(None, gated, produced.layers)})
            return complete(adapter, self.geometry.sites)
        if self.arch.encoder is not None:
            raise PrefixError(
                "hidden states stand before the tokens of a single stack; for an encoder-decoder "
                "take keys and values (method.name: prefix)"
            )
        tokens = TokenLayout.plain(jnp.ones((1, produced.h_LPD.shape[1]), bool))
        h_L1PD = produced.h_LPD[:, None].astype(_dtype(params))
        joined = site_of(stack.keys_values(params, h_L1PD, tokens))
        return Prefix.of({site: joined}, text_position=produced.h_LPD.shape[1])

    def read(self, params: Params, ids_P: jax.Array) -> tuple[Embeds, Hidden, Prefix]:
        """What a text leaves at the input embeddings, at the entry of every layer, and as keys
        and values: the three forms from which a prefix can start. All float32.

        An encoder-decoder reads the text on both sides; its decoder attends to what its encoder
        made of it.

        Raises:
            ContextError: the text is longer than the learned positions.
        """
        for reading in (self._stack, *([self._encoder] if self.arch.encoder else [])):
            reading.check_length(len(ids_P))
        tokens = TokenLayout.plain(jnp.ones((1, len(ids_P)), bool))
        embeds_1PD = self._embed(params, ids_P[None])
        # Soft tokens stand before the text that is given.
        read_1PD = embeds_1PD
        sites: dict[SiteName, Site] = {}
        encoded = None
        if self.arch.encoder is not None:
            encoder, weights = self._encoder, params["encoder"]
            read_1PD = self._embed(params, ids_P[None], self.reader_table(params))
            x_BTD = encoder.place(weights, read_1PD, tokens, 0)
            h_BTD, _, h_LBTD = encoder.run(weights, x_BTD, tokens, entries=True)
            sites["encoder"] = site_of(encoder.keys_values(weights, h_LBTD, tokens))
            encoded = self._encoded(params, encoder.finish(weights, h_BTD), tokens)
            sites["cross"] = site_of(as_stacked(encoded.layers))
        stack = self._stack
        x_BTD = stack.place(params, embeds_1PD, tokens, 0)
        layers, h_LBTD = self._read(params, x_BTD, tokens, encoded)
        sites[stack.site] = site_of(layers)
        found = (
            Embeds(read_1PD[0]),
            Hidden(h_LBTD[:, 0]),
            Prefix.of(sites, text_position=len(ids_P)),
        )
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found)

    def adapted(self, params: Params, hidden: Hidden) -> Adapter:
        """An adapter with closed gates that reads of these states what attention would: it stands
        behind the norm of each layer. float32."""
        h_L1PD = hidden.h_LPD[:, None].astype(_dtype(params))
        h_LPD = self._stack.over_layers(params, Layer.entry, h_L1PD)[:, 0]
        gate_LN = jnp.zeros((len(h_LPD), self.arch.heads))
        return Adapter(h_LPD.astype(jnp.float32), gate_LN)

    def _read(
        self, params: Params, x_BTD: jax.Array, tokens: TokenLayout, encoded: Encoded | None = None
    ) -> tuple[KeysValues, jax.Array]:
        """Stacked keys and values of one bare forward pass, and the states that entered layers."""
        stack = self._stack
        if not self.arch.causal:
            _, _, h_LBTD = stack.run(params, x_BTD, tokens, entries=True)
            return stack.keys_values(params, h_LBTD, tokens), h_LBTD
        cache = self.empty_cache(params, *x_BTD.shape[:2])
        _, cache, h_LBTD = stack.run(
            params, x_BTD, tokens, cache=cache, encoded=encoded, entries=True
        )
        return as_stacked(cache.layers), h_LBTD

    # The forward pass.

    def empty_cache(self, params: Params, rows: int, columns: int) -> Cache:
        """A cache for `rows` rows of up to `columns` tokens, in the dtype of the weights.

        Raises:
            BackboneError: the model is an encoder.
        """
        self._check_writes()
        unstacked = isinstance(params["layers"], tuple)
        return self._stack.empty_cache(_dtype(params), rows, columns, unstacked)

    def encode(
        self, params: Params, ids_BS: jax.Array, tokens: TokenLayout, prefix: Prefix | None = None
    ) -> Encoded:
        """Reads the source of an encoder-decoder, for `hidden`.

        Args:
            params: the weights, stacked or unstacked.
            ids_BS: token ids of the source.
            tokens: where each stands.
            prefix: what the encoder attends to besides, and soft tokens before its input. Those
                take the first P columns, and a row that has some holds one example.

        Raises:
            BackboneError: the model has no encoder.
            ContextError: a position exceeds a table of learned positions: see `Stack.place`.
        """
        h_BSD, tokens = self._through(
            self._encoder, params, params["encoder"], ids_BS, tokens, prefix
        )
        return self._encoded(params, h_BSD, tokens)

    def _encoded(self, params: Params, h_BSD: jax.Array, tokens: TokenLayout) -> Encoded:
        """The decoder's keys and values of an encoder's output."""
        if isinstance(params["layers"], tuple):
            layers: Any = tuple(
                Layer(self.arch).apply({"params": weights}, h_BSD, method=Layer.memory_keys_values)
                for weights in params["layers"]
            )
        else:
            layers = self._stack.over_layers(params, lambda layer: layer.memory_keys_values(h_BSD))
        return Encoded(layers, tokens)

    @overload
    def hidden(
        self,
        params: Params,
        ids_BT: jax.Array,
        tokens: TokenLayout,
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
        tokens: TokenLayout,
        prefix: Prefix | None,
        cache: Cache,
        lineage_BTS: jax.Array | None = None,
        encoded: Encoded | None = None,
    ) -> tuple[jax.Array, Cache]: ...

    def hidden(
        self,
        params: Params,
        ids_BT: jax.Array,
        tokens: TokenLayout,
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        lineage_BTS: jax.Array | None = None,
        encoded: Encoded | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs tokens through the model.

        Args:
            params: the weights, stacked or unstacked.
            ids_BT: token ids.
            tokens: where each stands; positions count from 0, the prefix's text position is
                added here.
            prefix: what every layer attends to besides; None is the bare model.
            cache: keys and values of earlier tokens, with room for T more columns.
            lineage_BTS: which keys each token descends from, in place of its branch.
            encoded: of `encode`, where the model has an encoder.

        Returns:
            h_BTD after the final norm, and the cache with these tokens in it. Soft tokens before
            an encoder that stands alone are columns of it too, the first P.

        Raises:
            BackboneError: the model has an encoder, and there is nothing that it read; or the
                other way round.
            ContextError: a position exceeds a table of learned positions: see `Stack.place`.
        """
        if (self.arch.encoder is None) != (encoded is None):
            has, needs = ("no", "no") if encoded is not None else ("an", "a")
            raise BackboneError(
                f"{self.arch.model_type} has {has} encoder: give `hidden` {needs} source that "
                "`encode` read"
            )
        T = ids_BT.shape[1]
        if not self.arch.causal:
            T += 0 if prefix is None else prefix.soft_tokens
            h_BTD, _ = self._through(self._stack, params, params, ids_BT, tokens, prefix)
            return h_BTD[:, :T], None
        if cache is None and lineage_BTS is None:
            ids_BT, tokens = zigzag.pad((ids_BT, tokens))
        stack = self._stack
        x_BTD = self._embed(params, ids_BT)
        x_BTD = stack.place(
            params, x_BTD, tokens, 0 if prefix is None else prefix.text_position_in("decoder")
        )
        h_BTD, cache, _ = stack.run(params, x_BTD, tokens, prefix, cache, lineage_BTS, encoded)
        return stack.finish(params, h_BTD)[:, :T], cache

    def _through(
        self,
        stack: Stack,
        params: Params,
        weights: Params,
        ids_BS: jax.Array,
        tokens: TokenLayout,
        prefix: Prefix | None,
    ) -> tuple[jax.Array, TokenLayout]:
        """Tokens through an encoder whose `weights` are a part of `params`, and where they stand
        there, behind soft ones if the prefix has some, and filled for devices that share them."""
        ids_BS, tokens = zigzag.pad((ids_BS, tokens))
        x_BSD = self._embed(params, ids_BS, self.reader_table(params))
        x_BSD, tokens = zigzag.pad(prepend(prefix, x_BSD, tokens))
        start = 0 if prefix is None else prefix.text_position_in("encoder")
        h_BSD, _, _ = stack.run(weights, stack.place(weights, x_BSD, tokens, start), tokens, prefix)
        return stack.finish(weights, h_BSD), tokens

    def unembed(self, params: Params, h_BTD: jax.Array) -> jax.Array:
        """logits_BTV in float32. Ask only where there is a target: V is large.

        Raises:
            BackboneError: the model is an encoder.
        """
        self._check_writes()
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
        """What `unembed` reads, as a loop over targets wants it on a mesh."""
        head = params.get("head", {})
        if self.arch.tied:
            table_VD = vocabulary.head(params["embed"]["tokens_VD"], 0)
            return {"embed": {"tokens_VD": table_VD}, "head": head}
        return {"head": {**head, "unembed_DV": vocabulary.head(head["unembed_DV"], 1)}}

    def _check_writes(self) -> None:
        if not self.arch.causal:
            raise BackboneError(
                f"{self.arch.model_type} is an encoder: it reads text and writes none. Train it "
                "for a task with labels (task.name: classify, regress, tag, span or choice), or "
                "take a decoder"
            )

    def pool(self, params: Params, h_BD: jax.Array) -> jax.Array:
        """What BERT's pretrained pooler makes of each example's first token, h_BD to [B, D]."""
        pooler = params["pooler"]
        return jnp.tanh(h_BD @ pooler["weight_DD"] + pooler["bias_D"])

    def reader_table(self, params: Params) -> Weight:
        """tokens_VD of the stack that reads the text that is given."""
        encoder = self.arch.encoder
        own = encoder is not None and encoder.own_tokens
        table_VD: Weight = (params["encoder"] if own else params)["embed"]["tokens_VD"]
        return table_VD

    def _embed(
        self, params: Params, ids_BT: jax.Array, table_VD: Weight | None = None
    ) -> jax.Array:
        """Token embeddings, scaled, in the dtype of the weights: of the decoder, unless another
        table is given."""
        table_VD = params["embed"]["tokens_VD"] if table_VD is None else table_VD
        x_BTD = take(table_VD, ids_BT)
        if self.arch.embed_scale is not None:
            x_BTD = x_BTD * jnp.asarray(self.arch.embed_scale, x_BTD.dtype)
        return x_BTD


def _dtype(params: Params) -> jax.typing.DTypeLike:
    return params["embed"]["tokens_VD"].dtype
