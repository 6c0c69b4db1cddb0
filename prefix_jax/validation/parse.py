"""Strict validation by pydantic, with conversions of unambiguous values."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError


@functools.cache
def adapter(hint: Any) -> TypeAdapter[Any]:
    """Returns pydantic's validator of a type."""
    config = None if dataclasses.is_dataclass(hint) else ConfigDict(allow_inf_nan=False)
    return TypeAdapter(hint, config=config)


def parse(hint: Any, value: Any, text: bool = True) -> Any:
    """Validates a plain value, and converts it to the type; the value itself may be modified.

    It is validated as JSON: for Python objects, strict validation would accept neither lists
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
    return adapter(hint).validate_json(json.dumps(box[0]), strict=True, extra="forbid")


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
