"""Loads the backbone of a stored prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from prefix_jax import artifact
from prefix_jax.artifact import Card
from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.errors import BackboneError


def backbone_of(
    card: Card,
    model: Pretrained | str | Path | None = None,
    *,
    allow_other_weights: bool = False,
) -> Pretrained:
    """Loads the backbone of a prefix with the dtype and quantisation used in training.

    Args:
        card: the card of the prefix.
        model: a backbone, or a path to load it from; None loads it from its path in training.
        allow_other_weights: accept a backbone with the same shape but other weights.

    Raises:
        BackboneError: the backbone cannot be loaded.
        PrefixError: the prefix was made for another backbone.
    """
    if not isinstance(model, Pretrained):
        dtype = cast(Literal["float32", "bfloat16"], card.backbone.dtype)
        try:
            model = load(
                card.backbone.source if model is None else model,
                dtype=dtype,
                quantize=card.backbone.quantize,
            )
        except BackboneError as error:
            if model is not None:
                raise
            raise BackboneError(
                f"cannot load the prefix's backbone {card.backbone.source}: {error}; "
                "give its current path (--model)"
            ) from None
    artifact.check(
        card,
        model.backbone.geometry,
        model.fingerprint,
        model.quantize,
        allow_other_weights=allow_other_weights,
    )
    return model
