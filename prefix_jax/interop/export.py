"""A prefix for other software: other containers, and plain keys and values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from prefix_jax import artifact
from prefix_jax.artifact import Card, Container
from prefix_jax.backbones.load import Pretrained
from prefix_jax.errors import PrefixError
from prefix_jax.interop.backbone import backbone_of
from prefix_jax.mesh import on_mesh_of
from prefix_jax.prefix import Prefix, Produced
from prefix_jax.untrusted.paths import expand


def export(
    source: str | Path,
    output: str | Path,
    to: Container = "safetensors",
    *,
    bake: bool = False,
    model: Pretrained | str | Path | None = None,
    allow_other_weights: bool = False,
) -> Card:
    """Copies a stored prefix; `docs/export.md` says how to use the copy without this package.

    Args:
        source: a stored prefix, or a run.
        output: the directory to write, which holds no prefix yet.
        to: the container of the arrays.
        bake: turn hidden states and soft tokens into the keys and values that they stand for. It
            takes the backbone; keys and values stay what they are, and take none.
        model: for `bake`, see `backbone_of`.
        allow_other_weights: for `bake`, see `backbone_of`.

    Returns:
        The card of the copy.

    Raises:
        PrefixError: the source is no prefix, or does not fit the backbone, or the output holds one.
        BackboneError: the backbone cannot be loaded.
        CheckpointError: the copy cannot be written.
    """
    if (expand(output, PrefixError) / "prefix.json").exists():
        raise PrefixError(
            f"{output} holds a prefix already; choose another directory, or remove it"
        )
    produced, card = artifact.load(source)
    if bake and not isinstance(produced, Prefix):
        pretrained = backbone_of(card, model, allow_other_weights=allow_other_weights)
        produced, card = baked(produced, card, pretrained)
    head = None if card.task is None else artifact.load_head(source)
    artifact.save(output, produced, card, to, head)
    return card


def baked(produced: Produced, card: Card, pretrained: Pretrained) -> tuple[Prefix, Card]:
    """The keys and values that a prefix stands for, and their card.

    Args:
        produced: of the method.
        card: of `produced`.
        pretrained: the backbone that it was made for.

    Raises:
        PrefixError: it has none, for it is soft tokens before an encoder.
    """
    with on_mesh_of(pretrained.params):
        prefix = jax.jit(pretrained.backbone.lift)(pretrained.params, produced)
    if prefix.embeds_PD is not None:
        raise PrefixError(
            "soft tokens before an encoder stand for no keys and values of their own: what they "
            "become depends on the text behind them; leave --bake out"
        )
    return prefix, dataclasses.replace(card, **dataclasses.asdict(artifact.facts(prefix)))
