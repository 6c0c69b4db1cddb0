"""Types of fields with their ranges, and their descriptions in words."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from annotated_types import Interval
from pydantic import AfterValidator

from prefix_jax.validation.plain import join

MAX_INT32 = 2**31 - 1


def _no_underflow(value: float) -> float:
    """Refuses what float32 cannot divide by."""
    if 0 < value < 1e-30:
        raise ValueError(f"must be 0 or at least 1e-30, got {value}")
    return value


# Counts that end up in 32-bit integers: steps, positions, token ids.
Count = Annotated[int, Interval(ge=0, le=MAX_INT32)]
PositiveInt = Annotated[int, Interval(ge=1, le=MAX_INT32)]
# Sizes of arrays: a million slots, rows or units is beyond every use.
Size = Annotated[int, Interval(ge=1, le=2**20)]
# Widths of the small networks that some methods train: papers use hundreds.
Width = Annotated[int, Interval(ge=1, le=2**16)]
# JAX drops the upper bits of larger seeds.
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]
# Magnitudes whose products and quotients stay within float32.
PositiveFloat = Annotated[float, Interval(ge=1e-30, le=1e30)]
NonNegativeFloat = Annotated[float, Interval(ge=0, le=1e30), AfterValidator(_no_underflow)]
Fraction = Annotated[float, Interval(ge=0, lt=1)]
Share = Annotated[float, Interval(gt=0, le=1)]
Probability = Annotated[float, Interval(ge=0, le=1)]


def keys(cls: type, where: str = "") -> Iterator[str]:
    """Yields every key of a dataclass with dots for nesting, sections included."""
    for name, hint in fields_of(cls).items():
        key = join(where, name)
        yield key
        if section := section_of(hint):
            yield from keys(section, key)


def hint_at(cls: type, key: str) -> Any:
    """Returns the type at a dotted key; `Any` if the dataclass does not declare it."""
    hint: Any = cls
    for name in key.split("."):
        section = section_of(hint)
        hint = fields_of(section).get(name, Any) if section else Any
    return hint


def accepts_text(hint: Any) -> bool:
    """Checks whether any string is a value of this type."""
    return str in members(hint)


def describe(hint: Any) -> str:
    """A type in words: "a positive integer below 2**31 or null", "one of none, full, dots"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        interval = next((extra for extra in args[1:] if isinstance(extra, Interval)), None)
        return describe(args[0]) if interval is None else _describe_range(args[0], interval)
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, args))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else str(args[0])
    if origin in (list, tuple):
        item = args[0]
        if get_origin(item) is Literal:
            return f"a list of any of {', '.join(map(str, get_args(item)))}"
        words, simple = re.subn(r"^an? (.*?\b(?:integer|number|string))", r"\1s", describe(item))
        return f"a list of {words if simple else f'items, each {words}'}"
    if dataclasses.is_dataclass(hint):
        return f"a section with keys {', '.join(fields_of(cast(type, hint)))}"
    return _NAMES.get(origin or hint, f"a {getattr(hint, '__name__', hint)}")


_NAMES: dict[Any, str] = {
    Any: "any value",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    dict: "a mapping",
    Mapping: "a mapping",
    None: "null",
    type(None): "null",
}


def _describe_range(kind: Any, allowed: Interval) -> str:
    if allowed == Interval(ge=0, le=MAX_INT32):
        return "a non-negative integer below 2**31"
    if allowed == Interval(ge=1, le=MAX_INT32):
        return "a positive integer below 2**31"
    low = f"[{allowed.ge}" if allowed.gt is None else f"({allowed.gt}"
    high = f"{allowed.le}]" if allowed.lt is None else f"{allowed.lt})"
    return f"{describe(kind)} in {low}, {high}".replace("e+", "e")


@functools.cache
def fields_of(cls: type) -> dict[str, Any]:
    """Returns the type hint of every field that a dataclass accepts."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cast(Any, cls)) if f.init}


def members(hint: Any) -> tuple[Any, ...]:
    """Returns the members of a union; another hint is its only member."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def section_of(hint: Any) -> type | None:
    """Returns the dataclass in a hint that is one, or one or None."""
    classes = [member for member in members(hint) if member is not type(None)]
    only = classes[0] if len(classes) == 1 else None
    return only if isinstance(only, type) and dataclasses.is_dataclass(only) else None
