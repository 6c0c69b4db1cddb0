"""Reads JSON Lines files: one object per line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from prefix_jax.errors import PrefixJaxError
from prefix_jax.untrusted.json import describe_json, parse_json
from prefix_jax.untrusted.lines import check_text, read_lines


def read_jsonl(
    path: str | os.PathLike[str], error: type[PrefixJaxError]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number of each line and its object. Blank lines are skipped.

    Args:
        path: the file.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if the file cannot be read (see `read_lines`), or a line
            is not a JSON object (see `parse_json`) or contains invalid Unicode.
    """
    for number, line in read_lines(path, error):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        value = parse_json(line, where, error, unique_keys=True)
        if not isinstance(value, dict):
            raise error(f"{where}: expected a JSON object on each line, got {describe_json(value)}")
        # An unpaired surrogate can only come from an escape.
        if "\\ud" in line or "\\uD" in line:
            check_text(value, where, error)
        yield number, value
