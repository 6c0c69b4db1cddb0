"""Plain values: what a configuration can hold, and how messages show it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from prefix_jax.errors import ConfigError

_MAX_DEPTH, _MAX_NODES = 100, 100_000
_MAX_KEY = 100  # characters of a key that are shown


class NotPlainError(ConfigError):
    """A value that no configuration can hold.

    Attributes:
        key: its key.
        text: the message.
    """

    def __init__(self, key: str, text: str) -> None:
        self.key, self.text = key_text(key), text
        super().__init__(f"{self.key}: {text}" if key else text)


def plain(values: Any, where: str = "") -> Any:
    """Copies nested mappings and lists of strings, numbers and null.

    NumPy's numbers become Python's, tuples become lists.

    Args:
        values: a mapping, or a single value.
        where: its key, for messages.

    Raises:
        ConfigError: there is anything else in it, text that is not valid Unicode, an integer of
            more than 64 bits, or too many values or levels (as when a list contains itself).
    """
    count = 0

    def copy(value: Any, key: str, depth: int) -> Any:
        nonlocal count
        count += 1
        if depth > _MAX_DEPTH or count > _MAX_NODES:
            most = f"{_MAX_DEPTH} levels" if depth > _MAX_DEPTH else f"{_MAX_NODES:,} values"
            raise NotPlainError(key, f"more than {most}, or a value that contains itself")
        if isinstance(value, Mapping):
            copied = {}
            for name, inner in value.items():
                inner_key = join(key, key_text(name))
                if isinstance(name, tuple | Mapping):
                    raise NotPlainError(inner_key, "a key must be a string or a number")
                copied[copy(name, inner_key, depth + 1)] = copy(inner, inner_key, depth + 1)
            return copied
        if isinstance(value, list | tuple):
            return [copy(item, key, depth + 1) for item in value]
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise NotPlainError(key, f"not valid Unicode text: {error.reason}") from None
            return str(value)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise NotPlainError(key, "an integer of more than 64 bits; give a smaller one")
        if value is None or isinstance(value, bool | int | float):
            return value
        raise NotPlainError(
            key, f"must consist of strings, numbers, lists and mappings, got {shown(value)}"
        )

    return copy(values, where, 0)


def shown(value: Any) -> str:
    """A value in a message, spelled as in YAML and of bounded length."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 10
_REPR.maxlevel = 4


def key_text(name: Any) -> str:
    """A key in a message, printable and of bounded length."""
    if not isinstance(name, str) or not name.isprintable():
        return shown(name)
    return name if len(name) <= _MAX_KEY else f"{name[:_MAX_KEY]}…"


def join(where: str, name: str) -> str:
    """Appends a name to a dotted key, which may be empty."""
    return f"{where}.{name}" if where else name
