"""Exports prefixes to other containers, and as plain keys and values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from prefix_jax import artifact
from prefix_jax.artifact import Card, Container
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.errors import PrefixError
from prefix_jax.interop.backbone import backbone_of
from prefix_jax.mesh import on_mesh_of
from prefix_jax.prefix import Prefix, Produced


def export(
    source: str | Path,
    output: str | Path,
    to: Container = "safetensors",
    *,
    bake: bool = False,
    model: Pretrained | str | Path | None = None,
    allow_other_weights: bool = False,
) -> Card:
    """Copies a stored prefix; `docs/export.md` explains how to use the copy without this package.

    Args:
        source: a stored prefix, or a run.
        output: the directory to write; it must not contain a prefix.
        to: the container of the arrays.
        bake: convert hidden states and soft tokens to keys and values, which needs the backbone. A
            prefix of keys and values is copied unchanged and does not need it.
        model: for `bake`, see `backbone_of`.
        allow_other_weights: for `bake`, see `backbone_of`.

    Returns:
        The card of the copy.

    Raises:
        PrefixError: the source is not a prefix or does not fit the backbone, or the output already
            contains one.
        BackboneError: the backbone cannot be loaded.
        CheckpointError: the copy cannot be written.
    """
    artifact.refuse_existing(output)
    produced, card = artifact.load(source)
    if bake and not isinstance(produced, Prefix):
        pretrained = backbone_of(card, model, allow_other_weights=allow_other_weights)
        produced, card = baked(produced, card, pretrained)
    head = None if card.head is None else artifact.load_head(source)
    artifact.save(output, produced, card, to, head, artifact.load_ngrams(source))
    return card


def baked(produced: Produced, card: Card, pretrained: Pretrained) -> tuple[Prefix, Card]:
    """Converts a prefix to keys and values, and returns them with their card.

    Args:
        produced: the prefix in its method's form.
        card: the card of `produced`.
        pretrained: the backbone that the prefix was made for.

    Raises:
        PrefixError: the prefix consists of soft tokens before an encoder.
    """
    with on_mesh_of(pretrained.params):
        prefix = jax.jit(pretrained.backbone.lift)(pretrained.params, produced)
    if prefix.embeds_PD is not None:
        raise PrefixError(
            "soft tokens before an encoder have no fixed keys and values, because they depend on "
            "the text after them; omit --bake"
        )
    return prefix, dataclasses.replace(card, **dataclasses.asdict(artifact.prefix_spec(prefix)))
