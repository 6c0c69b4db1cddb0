"""Parses JSON within limits on size and depth."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from prefix_jax.errors import PrefixJaxError
from prefix_jax.untrusted.paths import DEFAULT_LIMIT, read_text

# Deeper values can overflow the stack of recursive code.
MAX_DEPTH = 100


def parse_json(
    text: str, where: str, error: type[PrefixJaxError], *, unique_keys: bool = False
) -> Any:
    """Parses JSON.

    Args:
        text: one JSON value.
        where: the origin of the text, for messages.
        error: the class to raise.
        unique_keys: reject objects with duplicate keys. Otherwise the last one is kept.

    Raises:
        PrefixJaxError: of class `error`, if the text is malformed, nested more than `MAX_DEPTH`
            levels deep, contains a number of thousands of digits, or has a duplicate key.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except _DuplicateKeyError as failure:
        raise error(f"{where}: the key {failure} appears twice in one object") from None
    except json.JSONDecodeError as failure:
        place = f"column {failure.colno}"
        if "\n" in text.rstrip("\n"):
            place = f"line {failure.lineno}, {place}"
        raise error(f"{where}: malformed JSON ({failure.msg} at {place})") from None
    except RecursionError:
        raise error(f"{where}: JSON nested more than {MAX_DEPTH} levels deep") from None
    except ValueError:  # Python limits the digits of an integer
        digits = f"{sys.get_int_max_str_digits():,}"
        raise error(f"{where}: JSON with an integer of more than {digits} digits") from None
    if too_deep(value):
        raise error(f"{where}: JSON nested more than {MAX_DEPTH} levels deep")
    return value


def read_json(
    path: str | os.PathLike[str], error: type[PrefixJaxError], *, limit: int = DEFAULT_LIMIT
) -> Any:
    """Reads and parses a JSON file of at most `limit` bytes.

    Raises:
        PrefixJaxError: of class `error`, if the file cannot be read or `parse_json` refuses it.
    """
    return parse_json(read_text(path, error, limit=limit), str(path), error)


def read_json_object(
    path: str | os.PathLike[str], error: type[PrefixJaxError], *, limit: int = DEFAULT_LIMIT
) -> dict[str, Any]:
    """Like `read_json`, for a file that must hold an object."""
    value = read_json(path, error, limit=limit)
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, got {describe_json(value)}")
    return value


def describe_json(value: Any) -> str:
    """Returns the JSON type of a value, with an article: "an object"."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names: dict[type, str] = {dict: "an object", list: "an array", str: "a string"}
    return names.get(type(value), "a number")


def too_deep(value: Any) -> bool:
    """Returns whether lists and dicts are nested more than `MAX_DEPTH` levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return False
        level = [
            item
            for container in containers
            for item in (container.values() if isinstance(container, dict) else container)
        ]
    return True


class _DuplicateKeyError(Exception):
    """An object with a duplicate key."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _DuplicateKeyError(repr(name))
            seen.add(name)
    return fields
