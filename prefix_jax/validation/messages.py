"""Messages for pydantic's errors: the key, the expected and the actual value, and a fix."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal, cast, get_args, get_origin

from pydantic import ValidationError

from prefix_jax.validation.parse import parse
from prefix_jax.validation.plain import join, key_text, shown
from prefix_jax.validation.types import (
    accepts_text,
    describe,
    fields_of,
    keys,
    members,
    section_of,
)


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


def problems_of(cls: type, values: Any, where: str, error: ValidationError) -> list[Problem]:
    """Converts pydantic's errors to one problem per key."""
    found: dict[str, Problem] = {}
    replacements: set[str] = set()
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
            if new:
                replacements.add(join(parent, new))
            text = f"renamed to {join(parent, new)}" if new else _unknown(key, known, section)
            problem = Problem(key, text, renamed=new is not None)
        else:
            problem = Problem(key, message_of(detail, hint, value))
        found.setdefault(key, problem)
    # A required key under its former name is one problem, not two.
    return [problem for key, problem in found.items() if key not in replacements]


def message_of(detail: Any, hint: Any, value: Any) -> str:
    """Describes one of pydantic's errors for a field."""
    if detail["type"] == "missing":
        return f"missing; it must be {describe(hint)}"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    return f"must be {describe(hint)}, got {shown(value)}{_remedy(hint, value)}"


def _remedy(hint: Any, value: Any) -> str:
    """Suggests a fix for common mistakes."""
    choices = [
        x for member in members(hint) if get_origin(member) is Literal for x in get_args(member)
    ]
    if isinstance(value, str) and (near := difflib.get_close_matches(value, choices, n=1)):
        return f"; did you mean {near[0]}?"
    if bool in members(hint) and value in (0, 1, "on", "off", "On", "Off"):
        return "; write true or false"
    if not isinstance(value, list):
        if _accepts(hint, [value]):
            item = shown(value) if isinstance(value, str) and "{" in value else value
            return f"; write [{item}]"
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
        parse(hint, value)
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
