"""The backbone that a stored prefix belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from prefix_jax import artifact
from prefix_jax.artifact import Card
from prefix_jax.backbones.load import Pretrained, load
from prefix_jax.errors import BackboneError


def backbone_of(
    card: Card,
    model: Pretrained | str | Path | None = None,
    *,
    allow_other_weights: bool = False,
) -> Pretrained:
    """The backbone of a prefix, in the dtype that the prefix was trained with, quantised as then.

    Args:
        card: of the prefix.
        model: a backbone, or where to load it from; None loads it from where it was in training.
        allow_other_weights: accept a backbone of the same shape with other weights.

    Raises:
        BackboneError: it cannot be loaded.
        PrefixError: it is not the one that the prefix was made for.
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
                f"the prefix belongs to {card.backbone.source}: {error}; "
                "say where it is now (--model)"
            ) from None
    artifact.check(
        card,
        model.backbone.geometry,
        model.fingerprint,
        model.quantize,
        allow_other_weights=allow_other_weights,
    )
    return model
