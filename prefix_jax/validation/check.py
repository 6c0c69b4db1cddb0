"""Validation by pydantic, with messages of our own.

`build` makes a dataclass from a mapping and reports every problem with its full key;
`check_fields`, called from `__post_init__`, does the same where a dataclass is constructed in
Python; `require` checks one value of a file. All are strict: a boolean is no integer, a number no
string, and floats are finite.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from prefix_jax.errors import ConfigError, PrefixJaxError
from prefix_jax.validation.plain import NotPlainError, join, key_text, plain, shown
from prefix_jax.validation.types import (
    accepts_text,
    describe,
    fields_of,
    keys,
    members,
    section_of,
)

T = TypeVar("T")


def renamed(**names: str) -> Callable[[type[T]], type[T]]:
    """Declares former names of a dataclass's fields, whose use is an error with the new name."""

    def decorate(cls: type[T]) -> type[T]:
        init: Any = cls.__init__

        @functools.wraps(init)
        def checked(self: T, *args: Any, **fields: Any) -> None:
            if old := [f"{name}: renamed to {names[name]}" for name in fields if name in names]:
                raise ConfigError("; ".join(old))
            init(self, *args, **fields)

        cls.__init__ = checked  # type: ignore[method-assign, assignment]
        cls._renamed = names  # type: ignore[attr-defined]
        return cls

    return decorate


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Makes a dataclass from a mapping.

    Whole floats (1e3) are accepted as integers, and strings that spell a number or a truth value as
    one.

    Args:
        cls: a dataclass; its fields may be dataclasses themselves.
        values: field names to values.
        where: the key of the mapping, for messages: "method".

    Raises:
        ConfigError: every problem, one per line.
    """
    problems: list[Problem] = []
    built = construct(cls, values, where, problems)
    if built is None:
        raise ConfigError("\n".join(map(str, problems)))
    return built


def construct(cls: type[T], values: Any, where: str, problems: list[Problem]) -> T | None:
    """Like `build`, but appends to `problems` and returns None instead of raising."""
    try:
        values = plain(values, where)
        return cast(T, _parse(cls, values))
    except NotPlainError as error:
        problems.append(Problem(error.key, error.text))
    except ValidationError as error:
        problems += _problems(cls, values, where, error)
    return None


def check_fields(
    instance: Any, where: str = "", error: type[PrefixJaxError | ValueError] = ConfigError
) -> None:
    """Checks every field of a dataclass against its annotation; for `__post_init__`.

    Values are normalised as `build` does (lists become tuples, NumPy's numbers Python's), but
    strings that spell a number are refused: only files and command lines need them.

    Args:
        instance: a dataclass, which may be frozen.
        where: the key of the dataclass, for messages: "method".
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, with every field that has another type or is out of range.
    """
    problems = []
    cls: Any = type(instance)
    for name, hint in fields_of(cls).items():
        key, value = join(where, name), getattr(instance, name)
        section = section_of(hint)
        if section is not None and isinstance(value, section):
            continue
        try:
            value = plain(value, key)
            object.__setattr__(instance, name, _parse(hint, value, text=False))
        except NotPlainError as invalid:
            problems.append(Problem(invalid.key, invalid.text))
        except ValidationError as invalid:
            problems.append(Problem(key, _text(invalid.errors()[0], hint, value)))
    if problems:
        raise error("; ".join(map(str, problems)))


def check_conditions(*conditions: tuple[bool, str]) -> None:
    """Checks several fields together.

    Args:
        conditions: what must hold, and the message if it does not.

    Raises:
        ConfigError: every message of a condition that does not hold.
    """
    if broken := [message for holds, message in conditions if not holds]:
        raise ConfigError("; ".join(broken))


def require(value: Any, hint: Any, where: str, error: type[PrefixJaxError | ValueError]) -> Any:
    """Returns the value if it has the type and is in the range of a hint.

    Args:
        value: the value.
        hint: a type, such as `Size` or `list[str] | None`.
        where: the name of the value, for the message.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if it does not match.
    """
    if not matches(value, hint):
        raise error(f"{where} must be {describe(hint)}, got {shown(value)}")
    return value


def matches(value: Any, hint: Any) -> bool:
    """Checks whether a value has the type and is in the range of a hint."""
    try:
        _adapter(hint).validate_python(
            value.item() if isinstance(value, np.generic) else value, strict=True
        )
    except ValidationError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Problem:
    """An error message for one key.

    Attributes:
        key: dotted key; "" for problems of several keys.
        text: the message.
        renamed: whether the key is a former name.
    """

    key: str
    text: str
    renamed: bool = False

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" if self.key else self.text


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    config = None if dataclasses.is_dataclass(hint) else ConfigDict(allow_inf_nan=False)
    return TypeAdapter(hint, config=config)


def _parse(hint: Any, value: Any, text: bool = True) -> Any:
    """Validates a plain value, and modifies it.

    The value is validated as JSON: for Python objects, strict validation would accept neither lists
    as tuples nor mappings as dataclasses.

    Args:
        hint: the type.
        value: the result of `plain`.
        text: whether strings may spell numbers and truth values.
    """
    box = [value]
    try:
        return _validate(hint, box)
    except ValidationError as error:
        if not _convert(box, error, text):
            raise
    return _validate(hint, box)


def _validate(hint: Any, box: list[Any]) -> Any:
    return _adapter(hint).validate_json(json.dumps(box[0]), strict=True, extra="forbid")


def _convert(box: list[Any], error: ValidationError, text: bool) -> bool:
    """Replaces values of another type that are unambiguous; returns whether there were any."""
    converted = False
    for detail in error.errors(include_url=False):
        value = detail["input"]
        convert = _CONVERSIONS.get(detail["type"])
        if convert is None or (isinstance(value, str) and not text):
            continue
        if (new := convert(value)) is not None:
            inner: Any = box
            path: Any = 0
            for part in detail["loc"]:
                if not _contains(inner[path], part):
                    break  # pydantic's name of a union's member
                inner, path = inner[path], part
            inner[path] = new
            converted = True
    return converted


def _contains(value: Any, part: int | str) -> bool:
    return part in value if isinstance(value, dict) else isinstance(value, list)


def _to_bool(value: Any) -> bool | None:
    spelled = {"true": True, "yes": True, "false": False, "no": False}
    return spelled.get(value.lower()) if isinstance(value, str) else None


def _to_int(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    spelled = isinstance(value, str) and re.fullmatch(r"[-+]?\d(_?\d){,18}", value, re.ASCII)
    return int(value) if spelled else None


def _to_float(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


_CONVERSIONS: Mapping[str, Callable[[Any], Any]] = {
    "bool_type": _to_bool,
    "int_type": _to_int,
    "float_type": _to_float,
    # A section whose lines are all commented out reads as null.
    "dataclass_type": lambda value: {} if value is None else None,
}


def _problems(cls: type, values: Any, where: str, error: ValidationError) -> list[Problem]:
    """Converts pydantic's errors to one problem per key."""
    found: dict[str, Problem] = {}
    known = tuple(keys(cls, where))
    for detail in error.errors(include_url=False):
        hint, value, key, rest = cls, values, where, list(detail["loc"])
        while rest and (section := section_of(hint)) and rest[0] in fields_of(section):
            name = cast(str, rest.pop(0))
            hint, key = fields_of(section)[name], join(key, name)
            value = value.get(name) if isinstance(value, dict) else None
        if detail["type"] == "unexpected_keyword_argument":
            section, old = cast(type, section_of(hint)), rest[0]
            new = getattr(section, "_renamed", {}).get(old)
            key, parent = join(key, key_text(old)), key
            text = f"renamed to {join(parent, new)}" if new else _unknown(key, known, section)
            problem = Problem(key, text, renamed=new is not None)
        else:
            problem = Problem(key, _text(detail, hint, value))
        found.setdefault(key, problem)
    return list(found.values())


def _text(detail: Any, hint: Any, value: Any) -> str:
    if detail["type"] == "missing":
        return f"missing; it must be {describe(hint)}"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    return f"must be {describe(hint)}, got {shown(value)}{_remedy(hint, value)}"


def _remedy(hint: Any, value: Any) -> str:
    """Suggests a fix for common mistakes."""
    if bool in members(hint) and value in (0, 1, "on", "off", "On", "Off"):
        return "; write true or false"
    if not isinstance(value, list):
        if _accepts(hint, [value]):
            return f"; write [{value}]"
        quotable = accepts_text(hint) and isinstance(value, bool | int | float)
        return "; put quotes around it" if quotable else ""
    # A shell removes the quotes of "{a}", which is a mapping in YAML.
    texts = [f"{{{next(iter(v))}}}" if _braces(v) else v for v in value]
    if texts != value and _accepts(hint, texts):
        return f"; quote the braces, and in a shell the whole override: {shown(texts)}"
    texts = [v if isinstance(v, str) else shown(v) for v in value]
    if texts != value and _accepts(hint, texts):
        return f"; quote the strings: {shown(texts)}"
    return ""


def _braces(value: Any) -> bool:
    """Checks for the mapping that YAML reads from `{a}`."""
    return isinstance(value, dict) and list(value.values()) == [None]


def _accepts(hint: Any, value: list[Any]) -> bool:
    try:
        _parse(hint, value)
    except ValidationError:
        return False
    return True


def _unknown(key: str, known: tuple[str, ...], section: type) -> str:
    parent, _, name = key.rpartition(".")

    def likeness(candidate: str) -> float:
        section, _, leaf = candidate.rpartition(".")
        ratio = difflib.SequenceMatcher(None, name, leaf).ratio()
        return ratio + 0.1 * (section == parent) if ratio >= 0.6 else 0.0

    nearest = max(known, key=likeness, default="")
    guess = f" did you mean {nearest}?" if nearest and likeness(nearest) else ""
    return f"unknown key;{guess} known keys here: {', '.join(fields_of(section))}"
