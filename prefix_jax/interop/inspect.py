"""Inspects a stored prefix: its size, norms and nearest words."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax import artifact
from prefix_jax.artifact import Card
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.errors import BackboneError, ConfigError
from prefix_jax.interop.backbone import backbone_of
from prefix_jax.nn.quantized import QTensor, Weight, dequantize
from prefix_jax.prefix import Adapter, Embeds, Gated, Hidden, KVPrefix, Memory, Produced
from prefix_jax.untrusted.tokenizer import decode


@dataclasses.dataclass(frozen=True)
class Norms:
    """Euclidean norms of the vectors in one layer.

    Attributes:
        of: "keys" and "values" (per slot and head, H numbers each); "hidden states", "adapter
            states" or "soft tokens" (per slot, D numbers each); "gates" (per head, one number);
            "memory" (per head and feature, H numbers each).
        layer: the layer, from 0; None for soft tokens, which precede the first layer.
        min: the smallest norm.
        mean: the mean over all vectors.
        max: the largest norm.
    """

    of: str
    layer: int | None
    min: float
    mean: float
    max: float


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """A word of the vocabulary near a soft token.

    Attributes:
        text: the word.
        id: its token id.
        cosine: the cosine similarity of its embedding and the soft token.
    """

    text: str
    id: int
    cosine: float


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A summary of a stored prefix.

    Attributes:
        path: its directory.
        card: its metadata.
        bytes: its size on disk.
        parameters: its number of parameters.
        norms: norms of its vectors, per layer.
        nearest: the nearest words of the vocabulary for each soft token, nearest first; None if
            not available.
        note: the reason why `nearest` is None.
    """

    path: Path
    card: Card
    bytes: int
    parameters: int
    norms: tuple[Norms, ...]
    nearest: tuple[tuple[Neighbour, ...], ...] | None
    note: str | None


def inspect(
    path: str | Path,
    model: Pretrained | str | Path | None = None,
    *,
    words: int = 5,
    allow_other_weights: bool = False,
) -> Inspection:
    """Reads a prefix and summarises it.

    Args:
        path: a stored prefix, or a run.
        model: the backbone, for the nearest words of soft tokens; see `backbone_of`. If it is None
            and the backbone has moved since training, `note` reports that.
        words: the number of nearest words; 0 omits them, and does not load the backbone.
        allow_other_weights: see `backbone_of`.

    Raises:
        PrefixError: there is no prefix, or it does not fit the backbone.
        BackboneError: `model` cannot be loaded.
        ConfigError: `words` is negative.
    """
    if words < 0:
        raise ConfigError(f"words must be at least 0, got {words}")
    path = artifact.find(path)
    produced, card = artifact.load(path)
    nearest, note = None, None
    if not isinstance(produced, Embeds):
        note = f"nearest words: not applicable; {_NAMES[card.kind]} are not token embeddings"
    elif words:
        try:
            pretrained = backbone_of(card, model, allow_other_weights=allow_other_weights)
            nearest = nearest_words(produced, pretrained, words)
        except BackboneError as error:
            if model is not None:
                raise
            note = f"nearest words: not available; {error}"
    return Inspection(
        path=path,
        card=card,
        bytes=artifact.stored_bytes(path),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(produced)),
        norms=norms(produced),
        nearest=nearest,
        note=note,
    )


def norms(produced: Produced) -> tuple[Norms, ...]:
    """Computes the norms of a prefix's vectors: the keys of every layer, then the values."""
    if isinstance(produced, Embeds):
        return (_norms("soft tokens", None, produced.x_PD),)
    if isinstance(produced, Hidden):
        return tuple(_norms("hidden states", i, h) for i, h in enumerate(produced.h_LPD))
    if isinstance(produced, Adapter):
        layers = produced.layers or range(len(produced.h_LPD))
        parts = {"adapter states": produced.h_LPD, "gates": produced.gate_LN[..., None]}
        return tuple(
            _norms(of, i, layer)
            for of, x in parts.items()
            for i, layer in zip(layers, x, strict=True)
        )
    result = []
    for where, site in produced.sites.items():
        parts = {
            of: x
            for owner in (site.inside, site.outside)
            if isinstance(owner, KVPrefix | Gated)
            for of, x in (("keys", owner.k_LPKH), ("values", owner.v_LPKH))
        }
        if isinstance(site.outside, Gated):
            parts["gates"] = site.outside.gate_LN[..., None]
        if isinstance(site.outside, Memory):
            parts["memory"] = site.outside.m_LNHH
        for of, x in parts.items():
            layers = site.layers or range(len(x))
            name = of if len(produced.sites) == 1 else f"{where} {of}"
            result += [_norms(name, i, layer) for i, layer in zip(layers, x, strict=True)]
    return tuple(result)


def nearest_words(
    embeds: Embeds, pretrained: Pretrained, count: int = 5
) -> tuple[tuple[Neighbour, ...], ...]:
    """Finds the words whose embeddings have the largest cosine similarity to each soft token.

    Lester et al. (2021, section 7) interpret trained prompts this way.

    Args:
        embeds: soft tokens.
        pretrained: the backbone with its tokenizer.
        count: the number of words per soft token.
    """
    table_VD = pretrained.backbone.input_table(pretrained.params)
    cosines_PC, ids_PC = jax.device_get(
        _nearest(table_VD, embeds.x_PD, min(count, table_VD.shape[0]))
    )
    return tuple(
        tuple(
            Neighbour(decode(pretrained.tokenizer, [int(i)]), int(i), float(cosine))
            for i, cosine in zip(ids_C, cosines_C, strict=True)
        )
        for ids_C, cosines_C in zip(ids_PC, cosines_PC, strict=True)
    )


_NAMES = {"hidden": "hidden states", "adapter": "adapter states", "kv": "keys and values"}


def _norms(of: str, layer: int | None, x: jax.Array) -> Norms:
    lengths = np.linalg.norm(np.asarray(x, np.float64), axis=-1)
    return Norms(of, layer, *(float(f(lengths)) for f in (np.min, np.mean, np.max)))


@functools.partial(jax.jit, static_argnames="count")
def _nearest(table_VD: Weight, x_PD: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns cosines, largest first, and token ids, both [P, count]."""

    def unit(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        # Padding rows of a vocabulary may be zero.
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-20)

    if isinstance(table_VD, QTensor):
        table_VD = dequantize(table_VD)
    cosines_PV = jnp.matmul(unit(x_PD), unit(table_VD).T, precision="highest")
    cosines_PC, ids_PC = jax.lax.top_k(cosines_PV, count)
    return cosines_PC, ids_PC
