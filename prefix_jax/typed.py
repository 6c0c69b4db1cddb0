"""Dataclasses from plain mappings, with the type and range of every field checked in one place.

A field's annotation declares what it accepts: `Annotated[int, Range(1, 1024)] = 1`. `build` makes a
dataclass from a mapping and reports every problem with its full key; `check_fields`, called from
`__post_init__`, applies the same checks where a dataclass is constructed in Python.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
import types
from collections.abc import Iterator, Mapping
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np

from prefix_jax.errors import ConfigError
from prefix_jax.untrusted.yaml import MAX_DEPTH, MAX_NODES

T = TypeVar("T")

_FLOAT32 = (1e-30, 1e30)  # magnitudes whose products and quotients stay within float32
_TRUE, _FALSE = ("true", "yes"), ("false", "no")
_LONG = 100  # characters of a key that are compared and shown

MAX_INT32 = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a number may have. Infinity and NaN never pass.

    Attributes:
        low: the least value.
        high: the greatest value.
        low_open: excludes `low` itself.
        high_open: excludes `high` itself.
        float32: requires zero, or a magnitude that float32 can multiply and divide by.
    """

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    float32: bool = False

    def problem(self, value: float) -> str | None:
        """What is wrong with a value, in words; None if it is in range."""
        below = value <= self.low if self.low_open else value < self.low
        above = value >= self.high if self.high_open else value > self.high
        if not math.isfinite(value):
            text = "be finite"
        elif (below or above) and isinstance(value, float) and math.isfinite(self.high):
            text = f"be {self}"
        elif below:
            text = f"be {dataclasses.replace(self, high=math.inf)}"
        elif above:
            text = f"be {dataclasses.replace(self, low=-math.inf)}"
        elif self.float32 and value and not _FLOAT32[0] <= abs(value) <= _FLOAT32[1]:
            text = "be within reach of float32, 1e-30 to 1e30 in magnitude"
        else:
            return None
        whole = math.isfinite(value) and float(value).is_integer() and abs(value) < 2**53
        return f"must {text}, got {int(value) if whole else value}"

    def __str__(self) -> str:
        low, high = (f"{x:.0f}" if float(x).is_integer() else f"{x}" for x in (self.low, self.high))
        if math.isinf(self.low):
            return f"{'below' if self.high_open else 'at most'} {high}"
        if self.high >= MAX_INT32:
            if self.low == 0 and self.low_open:
                return "positive"
            return f"{'above' if self.low_open else 'at least'} {low}"
        return f"in {'(' if self.low_open else '['}{low}, {high}{')' if self.high_open else ']'}"


# Counts that end up in 32-bit integers: steps, positions, token ids.
Count = Annotated[int, Range(0, MAX_INT32)]
PositiveInt = Annotated[int, Range(1, MAX_INT32)]
# Sizes of arrays: a million slots, rows or units is beyond every use.
Size = Annotated[int, Range(1, 2**20)]
# Widths of the small networks that some methods train: papers use hundreds.
Width = Annotated[int, Range(1, 2**16)]
Fraction = Annotated[float, Range(0, 1, high_open=True)]
PositiveFloat = Annotated[float, Range(0, low_open=True, float32=True)]
NonNegativeFloat = Annotated[float, Range(0, float32=True)]
# JAX drops the upper bits of larger seeds.
Seed = Annotated[int, Range(0, 2**32 - 1)]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong at one key ("" if it concerns several).

    Attributes:
        key: with dots for nesting.
        text: the message.
        renamed: whether the key is the former name of another one.
    """

    key: str
    text: str
    renamed: bool = False

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" if self.key else self.text


class _NotPlain(ConfigError):
    """A mapping contains a value that no configuration can hold."""

    def __init__(self, key: str, text: str) -> None:
        self.problem = Problem(_key_text(key), text)
        super().__init__(str(self.problem))


class _Invalid(Exception):
    """A value does not fit a type hint: out of range, or (without text) of another type."""


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Makes a dataclass from a mapping.

    Args:
        cls: a dataclass; its fields may be dataclasses themselves.
        values: field names to values.
        where: the key of the mapping, for messages: "method".

    Raises:
        ConfigError: every problem found, one per line.
    """
    problems: list[Problem] = []
    built = construct(cls, values, where, problems)
    if built is None:
        raise ConfigError("\n".join(map(str, problems)))
    return built


def construct(cls: type[T], values: Any, where: str, problems: list[Problem]) -> T | None:
    """Like `build`, but appends to `problems` and returns None where `build` raises."""
    try:
        values = plain(values, where)
    except _NotPlain as error:
        problems.append(error.problem)
        return None
    return _construct(cls, values, where, problems, tuple(keys(cls, where)))


def check_fields(instance: Any, where: str = "") -> None:
    """Checks every field of a dataclass against its annotation; for `__post_init__`.

    Values are normalised as `build` does (lists become tuples, NumPy's numbers Python's), but text
    that spells a number is refused: only files and command lines have reason for it.

    Args:
        instance: of a dataclass, which may be frozen.
        where: the key of the dataclass, for messages: "method".

    Raises:
        ConfigError: every field that has another type or is out of range.
    """
    problems = []
    for name, hint in _fields(type(instance)).items():
        value, key = getattr(instance, name), _join(where, name)
        if section := _section(hint):
            absent = value is None and type(None) in _members(hint)
            if not absent and not isinstance(value, section):
                problems.append(Problem(key, f"expected {section.__name__}; got {shown(value)}"))
            continue
        found = len(problems)
        try:
            converted = _leaf(hint, plain(value, key), key, problems)
        except _NotPlain as error:
            problems.append(error.problem)
        if len(problems) > found:
            continue
        if isinstance(value, str) and not isinstance(converted, str):
            problems.append(Problem(key, f"expected {described(hint)}; got {shown(value)}"))
        object.__setattr__(instance, name, converted)
    if problems:
        raise ConfigError("; ".join(map(str, problems)))


def plain(values: Any, where: str = "") -> Any:
    """Copies nested mappings and lists of text, numbers and null.

    NumPy's numbers become Python's, tuples become lists.

    Args:
        values: a mapping, or a single value.
        where: its key, for messages.

    Raises:
        ConfigError: there is anything else in it, text that is not valid Unicode, an integer of
            more than 64 bits, more than `MAX_NODES` values or more than `MAX_DEPTH` levels (as
            when a list contains itself).
    """
    count = 0

    def copy(value: Any, key: str, depth: int) -> Any:
        nonlocal count
        count += 1
        if depth > MAX_DEPTH or count > MAX_NODES:
            limit = f"{MAX_DEPTH} levels" if depth > MAX_DEPTH else f"{MAX_NODES:,} values"
            raise _NotPlain(key, f"more than {limit}, or a value that contains itself")
        if isinstance(value, Mapping):
            copied = {}
            for name, inner in value.items():
                inner_key = _join(key, _key_text(name))
                if isinstance(name, tuple | Mapping):
                    raise _NotPlain(inner_key, "a key is text or a number, not a list")
                copied[copy(name, inner_key, depth + 1)] = copy(inner, inner_key, depth + 1)
            return copied
        if isinstance(value, list | tuple):
            return [copy(item, key, depth + 1) for item in value]
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise _NotPlain(key, f"not valid Unicode text: {error.reason}") from None
            return str(value)
        if isinstance(value, int):
            if not -(2**63) <= value < 2**63:
                raise _NotPlain(key, "an integer of more than 64 bits; give a smaller one")
            return int(value)
        if isinstance(value, float):
            return float(value)
        raise _NotPlain(key, f"expected text, numbers, lists and mappings; got {shown(value)}")

    return copy(values, where, 0)


def keys(cls: type, where: str = "") -> Iterator[str]:
    """Every key of a dataclass with dots for nesting, sections included."""
    for name, hint in _fields(cls).items():
        key = _join(where, name)
        yield key
        if section := _section(hint):
            yield from keys(section, key)


def hint_at(cls: type, key: str) -> Any:
    """The type at a dotted key; `Any` where the dataclass says nothing about it."""
    name, _, rest = key.partition(".")
    hint = _fields(cls).get(name, Any)
    if not rest:
        return hint
    section = _section(hint)
    return hint_at(section, rest) if section else Any


def renamed_fields(cls: type) -> Mapping[Any, str]:
    """Former names of a dataclass's fields, from its `RENAMED`, with the current ones."""
    return getattr(cls, "RENAMED", {})


def takes_text(hint: Any) -> bool:
    """Whether any string is a value of this type."""
    return str in _members(hint)


def described(hint: Any) -> str:
    """A type in words: "int or null", "one of none, full, dots"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return described(args[0])
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


def range_of(hint: Any) -> Range | None:
    """The range that a type hint declares for its numbers; None if it declares none."""
    for member in _members(hint):
        if get_origin(member) is Annotated:
            return next((extra for extra in get_args(member) if isinstance(extra, Range)), None)
    return None


def shown(value: Any) -> str:
    """A value in a message, as YAML spells it and of bounded length."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 10
_REPR.maxlevel = 4


def _construct(
    cls: type[T], values: Any, where: str, problems: list[Problem], known: tuple[str, ...]
) -> T | None:
    fields = _fields(cls)
    if not isinstance(values, Mapping):
        problems.append(
            Problem(where, f"expected a section with keys {', '.join(fields)}; got {shown(values)}")
        )
        return None
    found = len(problems)
    built: dict[str, Any] = {}
    for name, value in values.items():
        key = _join(where, _key_text(name))
        if name not in fields:
            if new := renamed_fields(cls).get(name):
                problems.append(Problem(key, f"renamed to {_join(where, new)}", renamed=True))
            else:
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
        return _convert(hint, value)
    except _Invalid as error:
        text = str(error) or f"expected {described(hint)}; got {shown(value)}{_remedy(hint, value)}"
        problems.append(Problem(key, text))
        return None


def _convert(hint: Any, value: Any) -> Any:
    """A plain value as an instance of a type.

    Besides exact matches: whole floats (1e3) are ints, ints are floats, and text that spells a
    number or a truth value is one.

    Raises:
        _Invalid: with a text if the value is out of range, without if it is of another type.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        converted = _convert(args[0], value)
        for extra in args[1:]:
            if isinstance(extra, Range) and (text := extra.problem(converted)):
                raise _Invalid(text)
        return converted
    if origin in (Union, types.UnionType):
        return _convert_union(args, value)
    if origin is Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
    elif origin in (tuple, list) and isinstance(value, list | tuple):
        return origin(_convert(args[0], item) for item in value)
    elif origin is dict and isinstance(value, Mapping):
        return {_convert(args[0], k): _convert(args[1], v) for k, v in value.items()}
    elif hint is Any or (hint is type(None) and value is None):
        return value
    elif hint in _SCALARS and (converted := _SCALARS[hint](value)) is not None:
        return converted
    raise _Invalid


def _convert_union(members: tuple[Any, ...], value: Any) -> Any:
    out_of_range = _Invalid()
    # Text is text before it is a number or null.
    for member in sorted(members, key=lambda member: member is not str):
        try:
            return _convert(member, value)
        except _Invalid as error:
            out_of_range = error if str(error) else out_of_range
    raise out_of_range


def _to_str(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _to_bool(value: Any) -> bool | None:
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    return value if isinstance(value, bool) else None


def _to_int(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d(_?\d){,18}", value, re.ASCII):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _to_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        raise _Invalid(f"must be finite, got {shown(value)}")
    return number


_SCALARS: Mapping[Any, Any] = {str: _to_str, bool: _to_bool, int: _to_int, float: _to_float}


def _remedy(hint: Any, value: Any) -> str:
    """What to write instead of a value, if it is one of the usual mistakes."""
    if bool in _members(hint) and value in (0, 1, "on", "off", "On", "Off"):
        return "; write true or false"
    if not isinstance(value, list):
        if _is_value(hint, [value]):
            return f"; write [{value}]"
        quotable = takes_text(hint) and isinstance(value, bool | int | float)
        return "; put quotes around it" if quotable else ""
    # A shell takes the quotes off "{a}", and YAML then reads a mapping.
    texts = [f"{{{next(iter(v))}}}" if _braces(v) else v for v in value]
    if texts != value and _is_value(hint, texts):
        return f"; put quotes around braces, and around the whole in a shell: {shown(texts)}"
    texts = [v if isinstance(v, str) else shown(v) for v in value]
    if texts != value and _is_value(hint, texts):
        return f"; put quotes around what is text: {shown(texts)}"
    return ""


def _braces(value: Any) -> bool:
    """Whether YAML made this of "{a}"."""
    return isinstance(value, dict) and list(value.values()) == [None]


def _is_value(hint: Any, value: Any) -> bool:
    try:
        _convert(hint, value)
    except _Invalid:
        return False
    return True


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
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cast(Any, cls)) if f.init}


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _section(hint: Any) -> type | None:
    """The dataclass in a hint that is one, or one or None."""
    members = [m for m in _members(hint) if m is not type(None)]
    only = members[0] if len(members) == 1 else None
    return only if isinstance(only, type) and dataclasses.is_dataclass(only) else None


def _key_text(name: Any) -> str:
    """A key in a message, printable and of bounded length."""
    if not isinstance(name, str) or not name.isprintable():
        return shown(name)
    return name if len(name) <= _LONG else f"{name[:_LONG]}…"


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
