"""Upgrades the card of a prefix that an older version stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Format 4 renamed these; formats 2 and 3 differ only in the card's digest.
_DECODE_3 = {
    "beams": "num_beams",
    "samples": "num_samples",
    "no_repeat_ngram": "no_repeat_ngram_size",
}
_METHOD_3 = {"mid": "mid_dim", "offset": "text_position"}
_CARD_3 = {"offset": "text_position"}


def upgrade(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a card under their current names.

    Args:
        fields: of `prefix.json`, with its `format_version`. Values of another type than the card
            declares stay as they are, for the card's own checks to report.
    """
    current = dict(fields)
    if current["format_version"] < 4:
        current = {_CARD_3.get(k, k): value for k, value in current.items()}
        _rename(current, "decode", _DECODE_3)
        _rename(current, "method", _METHOD_3)
    return current


def _rename(fields: dict[str, Any], section: str, names: Mapping[str, str]) -> None:
    if isinstance(fields.get(section), Mapping):
        fields[section] = {names.get(k, k): value for k, value in fields[section].items()}
