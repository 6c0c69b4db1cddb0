"""What a stored prefix is, in numbers that a person can judge."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax import artifact
from prefix_jax.artifact import Card
from prefix_jax.backbones.load import Pretrained
from prefix_jax.errors import BackboneError, ConfigError
from prefix_jax.interop.backbone import backbone_of
from prefix_jax.nn.quantized import QTensor, Weight, dequantize
from prefix_jax.prefix import Adapter, Embeds, Gated, Hidden, KVPrefix, Memory, Produced
from prefix_jax.untrusted.tokenizer import decode


@dataclasses.dataclass(frozen=True)
class Norms:
    """How long the vectors of one layer are (Euclidean).

    Attributes:
        of: "keys" and "values" (per slot and head, H numbers each); "hidden states", "adapter
            states" or "soft tokens" (per slot, D numbers each); "gates" (per head, one number);
            "memory" (per head and feature, H numbers each).
        layer: counted from 0; None for soft tokens, which stand before the first.
        min: of the shortest vector.
        mean: over all of them.
        max: of the longest.
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
        cosine: of the angle between its embedding and the soft token.
    """

    text: str
    id: int
    cosine: float


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a stored prefix is.

    Attributes:
        path: its directory.
        card: what is known of it.
        bytes: on disk.
        parameters: the numbers that it consists of.
        norms: layer by layer.
        nearest: for every soft token, the nearest words of the vocabulary, nearest first; None
            where there are none to tell.
        note: why `nearest` is None.
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
    """Reads a prefix and looks at it.

    Args:
        path: a stored prefix, or a run.
        model: the backbone, for the nearest words of soft tokens; see `backbone_of`. If None and
            it is not where it was in training, `note` says so.
        words: how many of the nearest words; 0 does without, and without the backbone.
        allow_other_weights: see `backbone_of`.

    Raises:
        PrefixError: there is no prefix, or it does not fit the backbone.
        BackboneError: `model` cannot be loaded.
        ConfigError: `words` is negative.
    """
    if words < 0:
        raise ConfigError(f"words is {words}; ask for 0 or more")
    path = artifact.find(path)
    produced, card = artifact.load(path)
    nearest, note = None, None
    if not isinstance(produced, Embeds):
        note = f"nearest words: none, for {_NAMES[card.kind]} do not stand where words do"
    elif words:
        try:
            pretrained = backbone_of(card, model, allow_other_weights=allow_other_weights)
            nearest = nearest_words(produced, pretrained, words)
        except BackboneError as error:
            if model is not None:
                raise
            note = f"nearest words: not known; {error}"
    return Inspection(
        path=path,
        card=card,
        bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(produced)),
        norms=norms(produced),
        nearest=nearest,
        note=note,
    )


def norms(produced: Produced) -> tuple[Norms, ...]:
    """The lengths of a prefix's vectors: of every layer's keys, then of every layer's values."""
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
    found = []
    for where, site in produced.sites.items():
        parts = {
            of: x
            for owner in (site.join, site.beside)
            if isinstance(owner, KVPrefix | Gated)
            for of, x in (("keys", owner.k_LPKH), ("values", owner.v_LPKH))
        }
        if isinstance(site.beside, Gated):
            parts["gates"] = site.beside.gate_LN[..., None]
        if isinstance(site.beside, Memory):
            parts["memory"] = site.beside.m_LNHH
        for of, x in parts.items():
            layers = site.layers or range(len(x))
            name = of if len(produced.sites) == 1 else f"{where} {of}"
            found += [_norms(name, i, layer) for i, layer in zip(layers, x, strict=True)]
    return tuple(found)


def nearest_words(
    embeds: Embeds, pretrained: Pretrained, count: int = 5
) -> tuple[tuple[Neighbour, ...], ...]:
    """For every soft token, the words whose embeddings have the largest cosine with it.

    Lester et al. (2021, section 7) read trained prompts this way.

    Args:
        embeds: soft tokens.
        pretrained: the backbone with its tokenizer.
        count: how many words.
    """
    table_VD = pretrained.backbone.reader_table(pretrained.params)
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
    """Cosines, largest first, and ids, both [P, count]."""

    def unit(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        # The rows that fill up a vocabulary may be zero.
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-20)

    if isinstance(table_VD, QTensor):
        table_VD = dequantize(table_VD)
    cosines_PV = jnp.matmul(unit(x_PD), unit(table_VD).T, precision="highest")
    cosines_PC, ids_PC = jax.lax.top_k(cosines_PV, count)
    return cosines_PC, ids_PC
