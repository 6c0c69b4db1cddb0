"""Brings prefixes back: our own, and those of Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefix_jax import artifact, config
from prefix_jax.api.tuned import Tuned
from prefix_jax.backbones.load import Pretrained
from prefix_jax.interop import peft
from prefix_jax.interop.backbone import backbone_of


def load_prefix(
    path: str | Path,
    model: Pretrained | str | Path | None = None,
    *,
    allow_other_weights: bool = False,
) -> Tuned:
    """Loads a stored prefix together with its backbone.

    Args:
        path: the directory of a prefix, or of a run that has ended.
        model: its backbone, or where to load it from; None loads the one that the prefix names.
        allow_other_weights: accept a backbone of the same shape with other weights.

    Raises:
        PrefixError: there is no prefix, it is damaged, or it belongs to another backbone.
        BackboneError: the backbone cannot be loaded.
    """
    produced, card = artifact.load(path)
    head = None if card.task is None else artifact.load_head(path)
    pretrained = backbone_of(card, model, allow_other_weights=allow_other_weights)
    return Tuned(pretrained, produced, card, head=head)


def import_peft(
    adapter: str | Path,
    model: Pretrained | str | Path | None = None,
    *,
    task: int | None = None,
    overrides: Sequence[str] = (),
) -> Tuned:
    """Loads an adapter of Hugging Face PEFT: what it computes there, it computes here.

    Args:
        adapter: what `PeftModel.save_pretrained` wrote, for a method that makes prefixes or soft
            tokens; see `prefix_jax.interop.peft`.
        model: its backbone, or where to load it from; None loads the one that the adapter names.
        task: which task of a multitask prompt, counted from 0.
        overrides: what an adapter does not tell, as on the command line: how records become text,
            "data.input={text}", and the names of a head's labels, "task.labels=[bad, good]".

    Raises:
        ConfigError: an override is not one of `data` or `task`.
        PrefixError: the adapter is damaged, of another type, or made for another backbone.
        BackboneError: the backbone cannot be loaded.
    """
    settings = config.sections(peft.ImportConfig, {}, overrides)
    imported = peft.import_peft(adapter, model, task=task, settings=settings)
    return Tuned(imported.pretrained, imported.produced, imported.card, head=imported.head)
