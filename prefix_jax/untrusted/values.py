"""Types and ranges of values from files, declared as type hints.

    Size = Annotated[int, Range(1, 2**31 - 1)]
    require(config.get("hidden_size"), Size, "config.json: hidden_size", BackboneError)

Unlike `isinstance`, a boolean is not an integer, an integer is a float, and floats are finite.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from prefix_jax.errors import PrefixJaxError


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; `low` itself is excluded if `open`."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.open else self.low <= value) and value <= self.high


# Sizes and ids: what indexes of 32 bits can count.
Size = Annotated[int, Range(1, 2**31 - 1)]
Count = Annotated[int, Range(0, 2**31 - 1)]
# Numbers that 32 bits can hold, also where a file writes them as integers.
Positive = Annotated[float, Range(0, 2**31 - 1, open=True)]
NonNegative = Annotated[float, Range(0, 2**31 - 1)]
Share = Annotated[float, Range(0, 1, open=True)]
Probability = Annotated[float, Range(0, 1)]


def matches(value: Any, hint: Any) -> bool:
    """Whether a value has the type and is in the range of a hint.

    Args:
        value: of a file, or of a dataclass made of it.
        hint: bool, int, float, str, None, Any, a dataclass, Literal, a union, list[…], tuple[…, …],
            dict[str, …], or Annotated numbers with a `Range`.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [extra for extra in args[1:] if isinstance(extra, Range)]
        return matches(value, args[0]) and all(value in allowed for allowed in ranges)
    if origin in (Union, types.UnionType):
        return any(matches(value, member) for member in args)
    if origin is Literal:
        return any(type(value) is type(known) and value == known for known in args)
    if origin in (list, tuple):
        return isinstance(value, origin) and all(matches(item, args[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            matches(key, args[0]) and matches(item, args[1]) for key, item in value.items()
        )
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool) and _is_finite(value)
    return isinstance(value, hint)


def require(value: Any, hint: Any, where: str, error: type[PrefixJaxError | ValueError]) -> Any:
    """Returns the value if it matches the hint.

    Args:
        value: the value.
        hint: see `matches`.
        where: the name of the value, for the message.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if it does not match.
    """
    if not matches(value, hint):
        raise error(f"{where} must be {describe(hint)}, got {_shorten(repr(value))}")
    return value


def require_fields(
    instance: Any, error: type[PrefixJaxError | ValueError], where: str = ""
) -> None:
    """Checks every field of a dataclass against its type hint, and the dataclasses in it.

    Args:
        instance: the dataclass.
        error: the class to raise.
        where: what precedes the names of the fields in messages, such as "geometry.".
    """
    cls: Any = type(instance)
    for name, hint in _hints(cls).items():
        value = require(getattr(instance, name), hint, where + name, error)
        if dataclasses.is_dataclass(value):
            require_fields(value, error, f"{where}{name}.")


def describe(hint: Any) -> str:
    """A hint in words: "a positive integer", "a list of strings or null"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _describe_range(args[0], next(x for x in args[1:] if isinstance(x, Range)))
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, args))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (list, tuple):
        return f"a list, each item {describe(args[0])}"
    if origin in (dict, Mapping):
        return "an object"
    return _NAMES.get(hint) or f"a {getattr(hint, '__name__', hint)}"


_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a string",
    None: "null",
    type(None): "null",
}


def _describe_range(kind: Any, allowed: Range) -> str:
    noun = "integer" if kind is int else "number"
    if allowed in (Range(1, 2**31 - 1), Range(0, 2**31 - 1, open=True)):
        return f"a positive {noun} below 2**31"
    low = (
        "" if allowed.low == -math.inf else f" {'above' if allowed.open else 'from'} {allowed.low}"
    )
    high = "" if allowed.high == math.inf else f" to {allowed.high}"
    return f"{'an' if kind is int else 'a'} {noun}{low}{high}"


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _shorten(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[:length]}…"
