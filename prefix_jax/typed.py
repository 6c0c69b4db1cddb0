"""Dataclasses from plain mappings: every problem collected, each with its full key.

Sections (dataclasses in dataclasses) are walked here, so that a message can name the whole path
and the nearest key that exists; each leaf is converted and checked by jsonargparse.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from prefix_jax.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong at one key ("" where it concerns all of them together)."""

    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" if self.key else self.text


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Makes a dataclass from a mapping.

    Args:
        cls: a dataclass; its fields may be dataclasses themselves.
        values: field names to values.
        where: the key under which the mapping stands, for messages: "method".

    Raises:
        ConfigError: every problem found, one a line.
    """
    problems: list[Problem] = []
    built = construct(cls, values, where, problems)
    if built is None:
        raise ConfigError("\n".join(map(str, problems)))
    return built


def construct(cls: type[T], values: Any, where: str, problems: list[Problem]) -> T | None:
    """Like `build`, but appends to `problems` and returns None where `build` raises."""
    return _construct(cls, values, where, problems, tuple(keys(cls, where)))


def keys(cls: type, where: str = "") -> Iterator[str]:
    """Every key of a dataclass with dots for nesting, sections included."""
    for name, hint in _fields(cls).items():
        key = _join(where, name)
        yield key
        if section := _section(hint):
            yield from keys(section, key)


def hint_at(cls: type, key: str) -> Any:
    """The type that stands at a dotted key; `Any` where the dataclass says nothing about it."""
    name, _, rest = key.partition(".")
    hint = _fields(cls).get(name, Any)
    if not rest:
        return hint
    section = _section(hint)
    return hint_at(section, rest) if section else Any


def takes_text(hint: Any) -> bool:
    """Whether any string is a value of this type."""
    return str in _members(hint)


def described(hint: Any) -> str:
    """A type in words: "int or null", "one of none, full, dots"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(described, args))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (tuple, list):
        return f"list of {described(args[0])}"
    if hint is type(None):
        return "null"
    if _section(hint):
        return f"a section with keys {', '.join(_fields(hint))}"
    return str(getattr(origin or hint, "__name__", hint))


def _construct(
    cls: type[T], values: Any, where: str, problems: list[Problem], known: tuple[str, ...]
) -> T | None:
    fields = _fields(cls)
    if not isinstance(values, Mapping):
        problems.append(
            Problem(where, f"expected a section with keys {', '.join(fields)}; got {values!r}")
        )
        return None
    found = len(problems)
    built: dict[str, Any] = {}
    for name, value in values.items():
        key = _join(where, str(name))
        if name not in fields:
            problems.append(Problem(key, _unknown(key, known, fields)))
        elif section := _section(fields[name]):
            if value is None and type(None) in _members(fields[name]):
                built[name] = None
            else:
                # A section whose lines are all commented out reads as null.
                inner = {} if value is None else value
                built[name] = _construct(section, inner, key, problems, known)
        else:
            built[name] = _leaf(fields[name], value, key, problems)
    for field in dataclasses.fields(cast(Any, cls)):
        required = field.default is field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in values:
            expected = described(fields[field.name])
            problems.append(Problem(_join(where, field.name), f"missing; expected {expected}"))
    if len(problems) > found:
        return None
    try:
        return cls(**built)
    except ConfigError as error:
        problems.append(Problem(where, str(error)))
        return None


def _leaf(hint: Any, value: Any, key: str, problems: list[Problem]) -> Any:
    try:
        json.dumps(value, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError as error:
        problems.append(Problem(key, f"not valid Unicode text: {error.reason}"))
        return None
    # jsonargparse sees null in the text "null" and, in a free form, a number in "1e3". Both may be
    # perfectly good words, and YAML has told them apart already.
    if isinstance(value, str) and takes_text(hint):
        return value
    if isinstance(value, dict) and hint == dict[str, Any]:
        return value
    try:
        if value is None and not {type(None), Any} & set(_members(hint)):
            raise ArgumentError(None, "null")
        return _parser(hint).parse_object({"value": value}).value
    except ArgumentError:
        expected = f"expected {described(hint)}; got {value!r}"
        problems.append(Problem(key, expected + _remedy(hint, value)))
        return None


def _remedy(hint: Any, value: Any) -> str:
    """What to write instead of a value, where it is one of two mistakes that are easily made."""
    if not isinstance(value, list):
        return f"; write [{value}]" if _is_value(hint, [value]) else ""
    # A shell takes the quotes off "{a}", and YAML then reads a mapping.
    texts = [f"{{{next(iter(v))}}}" if _braces(v) else v for v in value]
    if texts == value or not _is_value(hint, texts):
        return ""
    return f"; put quotes around braces, and around the whole in a shell: {texts}"


def _braces(value: Any) -> bool:
    """Whether YAML made this of "{a}"."""
    return isinstance(value, dict) and list(value.values()) == [None]


def _is_value(hint: Any, value: Any) -> bool:
    try:
        _parser(hint).parse_object({"value": value})
    except ArgumentError:
        return False
    return True


@functools.cache
def _parser(hint: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _unknown(key: str, known: tuple[str, ...], here: Mapping[str, Any]) -> str:
    parent, _, name = key.rpartition(".")

    def likeness(candidate: str) -> float:
        section, _, leaf = candidate.rpartition(".")
        ratio = difflib.SequenceMatcher(None, name, leaf).ratio()
        return ratio + 0.1 * (section == parent) if ratio >= 0.6 else 0.0

    nearest = max(known, key=likeness, default="")
    guess = f" did you mean {nearest}?" if nearest and likeness(nearest) else ""
    return f"unknown key;{guess} known keys here: {', '.join(here)}"


def _fields(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cast(Any, cls)) if f.init}


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _section(hint: Any) -> type | None:
    """The dataclass in a hint that is one, or one or None."""
    members = [m for m in _members(hint) if m is not type(None)]
    only = members[0] if len(members) == 1 else None
    return only if isinstance(only, type) and dataclasses.is_dataclass(only) else None


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
