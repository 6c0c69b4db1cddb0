"""Prefix types: what methods produce, backbones lift and attention reads.

A prefix is a KV cache that you can train. A method produces one of four types, and `lift` converts
each of them to a `Prefix`, the only form that attention accepts:

    Embeds   x_PD              soft tokens at the input embeddings (prompt tuning)
    Hidden   h_LPD             hidden states prepended to the tokens in every layer
    Adapter  h_LPD, gate_LN    states with a gated softmax of their own (LLaMA-Adapter)
    Prefix   k, v, …           keys and values per site and layer
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import flax.struct
import jax

from prefix_jax.errors import ConfigError
from prefix_jax.validation import PositiveInt, check_fields

# The attentions of a transformer that a prefix can reach. Encoder-only and decoder-only models have
# one.
SiteName = Literal["encoder", "decoder", "cross"]
SITES: tuple[SiteName, ...] = ("encoder", "decoder", "cross")

# A stack of layers. Encoder-only and decoder-only models have one.
StackName = Literal["encoder", "decoder"]

# The layers of the leading axis L of a prefix, in ascending order; None for all layers.
Layers = tuple[int, ...] | None


@flax.struct.dataclass
class KVPrefix:
    """Keys and values inside the softmax of every layer.

    Attributes:
        k_LPKH: keys as attention reads them, after any rotary embedding.
        v_LPKH: values.
        bias_LPN: added to the attention logits of each query head; minus infinity removes a slot.
            None adds nothing.
    """

    k_LPKH: jax.Array
    v_LPKH: jax.Array
    bias_LPN: jax.Array | None = None

    @property
    def length(self) -> int:
        """P, the number of prefix slots."""
        return self.k_LPKH.shape[-3]


@flax.struct.dataclass
class Gated:
    """Keys and values with a softmax of their own, added through a gate (Zhang et al. 2023).

    Attributes:
        k_LPKH: keys, without any rotary embedding.
        v_LPKH: values.
        gate_LN: multiplies the output of each query head.
    """

    k_LPKH: jax.Array
    v_LPKH: jax.Array
    gate_LN: jax.Array

    @property
    def length(self) -> int:
        """P, the number of slots."""
        return self.k_LPKH.shape[-3]


@flax.struct.dataclass
class Memory:
    """A matrix per head that maps queries to outputs (Prefix-Tuning+, Wang et al. 2025).

    Attributes:
        m_LNHH: the query features elu(q) times this matrix are added to the output of the head.
    """

    m_LNHH: jax.Array


@flax.struct.dataclass
class OutsideRows:
    """Terms outside the softmax that differ between the rows of a batch.

    Rows without a term have zero gates and matrices.

    Attributes:
        gated: k_BPKH, v_BPKH and gate_BN of one layer; None if no row has gated slots.
        slots_B: the number of gated slots of each row; the others are padding.
        memory: m_BNHH of one layer; None if no row has matrices.
    """

    gated: Gated | None
    slots_B: jax.Array
    memory: Memory | None


Outside = Gated | Memory | OutsideRows


@flax.struct.dataclass
class SharedSlots:
    """Slots of one layer inside the softmax, which some rows of a batch see and others do not.

    Heads precede slots, as in a KV cache.

    Attributes:
        k_KPH, v_KPH: keys and values.
        bias_NP: added to the attention logits of each query head.
    """

    k_KPH: jax.Array
    v_KPH: jax.Array
    bias_NP: jax.Array


@flax.struct.dataclass
class Site:
    """The part of a prefix at one attention of a transformer.

    Attributes:
        inside: keys and values inside the softmax.
        outside: a term added outside the softmax, which depends only on the query.
        layers: the layers that have this part; None for all. `lift` fills in the others.
        shared: in place of `inside`, one layer of several prefixes, of which each row of a batch
            sees at most one. `MaskAndBias.mask_BTP` says which slots a query sees, for the slots of
            all of them one after another. For decoding only.
    """

    inside: KVPrefix | None = None
    outside: Outside | None = None
    layers: Layers = flax.struct.field(pytree_node=False, default=None)
    shared: tuple[SharedSlots, ...] = ()

    @property
    def length(self) -> int:
        """P, the number of slots inside the softmax."""
        return 0 if self.inside is None else self.inside.length


@flax.struct.dataclass
class Prefix:
    """A prefix as attention reads it.

    Attributes:
        decoder: the site at the decoder's self-attention.
        encoder: the site at the encoder's self-attention.
        cross: the site where a decoder attends to its encoder.
        embeds_PD: soft tokens before the input of an encoder. Their hidden states depend on the
            text that follows, so they cannot be converted to keys and values.
        text_position: the position of the first token of text, in every stack whose self-attention
            has slots. Usually P, as in PEFT and in the GPT-2 code of Li & Liang (2021).
        pinned: whether the prefix stays visible after a sliding window has moved past it. If False,
            it leaves the window like ordinary past tokens.
        bank_size: A for a bank, A concatenated prefixes with P slots each. A token sees only the
            slots of one of them (`TokenLayout.bank_index_BT`), and the positions of each prefix's
            slots are 0 to P - 1. None for a single prefix, which every token sees.

    Examples:
        >>> import jax.numpy as jnp
        >>> slots = KVPrefix(k_LPKH=jnp.ones((12, 8, 4, 64)), v_LPKH=jnp.ones((12, 8, 4, 64)))
        >>> Prefix(decoder=Site(slots), text_position=8).length
        8
    """

    decoder: Site | None = None
    encoder: Site | None = None
    cross: Site | None = None
    embeds_PD: jax.Array | None = None
    text_position: int = flax.struct.field(pytree_node=False, default=0)
    pinned: bool = flax.struct.field(pytree_node=False, default=False)
    bank_size: int | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def of(
        cls, sites: Mapping[SiteName, Site], *, text_position: int = 0, pinned: bool = False
    ) -> Prefix:
        """Builds a prefix from sites by name."""
        return cls(
            decoder=sites.get("decoder"),
            encoder=sites.get("encoder"),
            cross=sites.get("cross"),
            text_position=text_position,
            pinned=pinned,
        )

    @property
    def sites(self) -> dict[SiteName, Site]:
        """The sites of this prefix, by name."""
        sites = {name: getattr(self, name) for name in SITES}
        return {name: site for name, site in sites.items() if site is not None}

    @property
    def length(self) -> int:
        """P, the largest number of slots at any site; 0 without slots. Per prefix, in a bank."""
        lengths = [self.soft_tokens * (self.bank_size or 1)]
        for site in self.sites.values():
            lengths.append(site.length)
            if isinstance(site.outside, Gated):
                lengths.append(site.outside.length)
        return max(lengths) // (self.bank_size or 1)

    @property
    def soft_tokens(self) -> int:
        """The number of soft tokens before the input of an encoder. Per prefix, in a bank."""
        return 0 if self.embeds_PD is None else len(self.embeds_PD) // (self.bank_size or 1)

    def split_bank(self) -> tuple[Prefix, ...]:
        """Splits a bank into its prefixes. A single prefix is returned unchanged."""
        if self.bank_size is None:
            return (self,)
        return tuple(self._member(index, self.bank_size) for index in range(self.bank_size))

    def _member(self, index: int, size: int) -> Prefix:
        def select(leaf: jax.Array, axis: int) -> jax.Array:
            P = leaf.shape[axis] // size
            return jax.lax.slice_in_dim(leaf, index * P, (index + 1) * P, axis=axis)

        sites = {
            name: dataclasses.replace(
                site, inside=jax.tree.map(lambda leaf: select(leaf, 1), site.inside)
            )
            for name, site in self.sites.items()
        }
        prefix = Prefix.of(sites, text_position=self.text_position, pinned=self.pinned)
        embeds_PD = None if self.embeds_PD is None else select(self.embeds_PD, 0)
        return dataclasses.replace(prefix, embeds_PD=embeds_PD)

    def text_position_in(self, stack: StackName) -> int:
        """The position of the first token of text in a stack; 0 if no slots precede it."""
        site: Site | None = getattr(self, stack)
        return self.text_position if site is not None and site.length else 0


@flax.struct.dataclass
class Hidden:
    """Hidden states prepended to the input of every layer, h_LPD."""

    h_LPD: jax.Array


@flax.struct.dataclass
class Adapter:
    """States that layers attend to in a separate softmax (LLaMA-Adapter, Zhang et al. 2023).

    Attributes:
        h_LPD: states that the layer's own projections map to keys and values, without norm and
            rotation.
        gate_LN: multiplies the output of each query head; if N is 1, all heads share the gate.
        layers: the layers that have these states; None for all.
    """

    h_LPD: jax.Array
    gate_LN: jax.Array
    layers: Layers = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class Embeds:
    """Soft tokens prepended to the input embeddings.

    Attributes:
        x_PD: the soft tokens.
        bank_size: A for a bank, as in `Prefix`: A concatenated soft prompts.
    """

    x_PD: jax.Array
    bank_size: int | None = flax.struct.field(pytree_node=False, default=None)

    def split_bank(self) -> tuple[Embeds, ...]:
        """Splits a bank into its soft prompts; one element without a bank."""
        x_APD = self.x_PD.reshape(self.bank_size or 1, -1, self.x_PD.shape[1])
        return tuple(Embeds(x_PD) for x_PD in x_APD)


Produced = Embeds | Hidden | Adapter | Prefix


@dataclasses.dataclass(frozen=True)
class SiteShape:
    """The shape of one attention.

    Attributes:
        layers: L.
        query_heads: N.
        kv_heads: K.
        head_dim: H.
    """

    layers: PositiveInt
    query_heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The dimensions of a backbone that a prefix depends on. At least one of `decoder` and
    `encoder` is set.

    Attributes:
        d_model: D.
        vocab: V.
        decoder, encoder, cross: the shapes of its attentions, None if absent.
        embed_dim: width of the input embeddings, if it is not D.
    """

    d_model: PositiveInt
    vocab: PositiveInt
    decoder: SiteShape | None = None
    encoder: SiteShape | None = None
    cross: SiteShape | None = None
    embed_dim: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.decoder is None and self.encoder is None:
            raise ConfigError("geometry: decoder and encoder are both missing; give at least one")

    @property
    def input_dim(self) -> int:
        """The width of input embeddings and soft tokens."""
        return self.embed_dim or self.d_model

    @property
    def sites(self) -> dict[SiteName, SiteShape]:
        """The attentions of the backbone, by name."""
        shapes = {name: getattr(self, name) for name in SITES}
        return {name: shape for name, shape in shapes.items() if shape is not None}

    @property
    def main_site(self) -> SiteName:
        """The self-attention of the stack that a head reads: the decoder if there is one."""
        return "encoder" if self.decoder is None else "decoder"

    @property
    def main(self) -> SiteShape:
        """The shape of `main_site`."""
        return self.sites[self.main_site]
