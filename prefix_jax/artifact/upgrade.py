"""Upgrades the cards of earlier formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The fields of each task that format 3 stored in `template` and in `task.config`.
_SHARED = ("prepare", "max_length", "truncate")
_FIELDS = {
    "text": ("input", "target", "references", "loss", "on_overflow"),
    "chat": ("messages", "loss", "on_overflow"),
    "classify": ("label", "input", "pair", "labels", "dropout", "reads_soft"),
    "regress": ("label", "input", "pair", "dropout", "reads_soft"),
    "tag": ("label", "words", "labels", "dropout"),
    "span": ("label", "input", "pair", "stride", "answer_tokens", "unanswerable"),
    "choice": ("label", "input", "choices", "labels", "dropout"),
}


# Format 4 renamed these.
_DECODE_3 = {
    "beams": "num_beams",
    "samples": "num_samples",
    "no_repeat_ngram": "no_repeat_ngram_size",
}
# `tasks` and `task` were still in use at the beginning of format 4.
_METHOD = {"mid": "mid_dim", "offset": "text_position", "tasks": "datasets", "task": "dataset"}
_CARD_3 = {"offset": "text_position"}


def upgrade(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a card in the current format.

    Format 2 has no digest. Format 3 has other names for some fields, and spreads the task over
    `template` (how records became text) and `task` (with the layers of its head). Damaged fields
    stay as they are, so that the card's own checks report them.

    Args:
        fields: the fields of `prefix.json`, with its `format_version`.
    """
    card = dict(fields)
    _rename(card, "method", _METHOD)
    if fields["format_version"] >= 4:
        return card
    card = {_CARD_3.get(k, k): value for k, value in card.items()}
    _rename(card, "decode", _DECODE_3)
    template, old = card.pop("template", None), card.pop("task", None)
    card["task"] = _task(template, old)
    if isinstance(old, Mapping):
        head = old.get("head")
        card["head"] = (
            {name: value for name, value in head.items() if name != "kind"}
            if isinstance(head, Mapping)
            else head
        )
    method = card.get("method")
    if isinstance(template, Mapping) and template.get("task") is not None:
        name = method.get("dataset") if isinstance(method, Mapping) else None
        card["dataset"] = {"field": template["task"], "name": name}
    return card


def _task(template: Any, old: Any) -> Any:
    """Returns the name and the fields of a task; None if neither part was stored."""
    if template is None and old is None:
        return None
    if not isinstance(template, Mapping | None) or not isinstance(old, Mapping | None):
        return [template, old]
    template = template or {}
    if old is None:
        name: Any = "text" if template.get("messages") is None else "chat"
        values = template
    else:
        config = old.get("config")
        if not isinstance(config, Mapping):
            return config
        name, values = config.get("name"), {**template, **config}
    names = (*_SHARED, *_FIELDS.get(name, ())) if isinstance(name, str) else ()
    return {"name": name} | {field: values[field] for field in names if field in values}


def _rename(fields: dict[str, Any], section: str, names: Mapping[str, str]) -> None:
    if isinstance(fields.get(section), Mapping):
        fields[section] = {names.get(k, k): value for k, value in fields[section].items()}
