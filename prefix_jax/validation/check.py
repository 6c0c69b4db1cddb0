"""Checks of dataclasses and of single values.

`build` makes a dataclass from a mapping and reports every problem with its full key;
`check_fields`, called from `__post_init__`, does the same where a dataclass is constructed in
Python; `require` checks one value of a file. All are strict: a boolean is no integer, a number no
string, and floats are finite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import numpy as np
from pydantic import ValidationError

from prefix_jax.errors import ConfigError, PrefixJaxError
from prefix_jax.validation.messages import Problem, message_of, problems_of
from prefix_jax.validation.parse import adapter, parse
from prefix_jax.validation.plain import NotPlainError, join, plain, shown
from prefix_jax.validation.types import describe, fields_of, section_of

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def renamed(**names: str) -> Callable[[type[T]], type[T]]:
    """Declares former names of a dataclass's fields, whose use is an error with the new name."""

    def decorate(cls: type[T]) -> type[T]:
        init: Any = cls.__init__

        @functools.wraps(init)
        def checked(self: T, *args: Any, **fields: Any) -> None:
            _reject_former_names(names, fields)
            init(self, *args, **fields)

        cls.__init__ = checked  # type: ignore[method-assign, assignment]
        cls._renamed = names  # type: ignore[attr-defined]
        return cls

    return decorate


def renamed_arguments(**names: str) -> Callable[[F], F]:
    """Declares former names of a function's arguments, whose use is an error with the new name."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def checked(*args: Any, **arguments: Any) -> Any:
            _reject_former_names(names, arguments)
            return function(*args, **arguments)

        return cast(F, checked)

    return decorate


def _reject_former_names(names: Mapping[str, str], arguments: Mapping[str, Any]) -> None:
    """Raises ConfigError if an argument has a former name."""
    if former := [f"{name}: renamed to {names[name]}" for name in arguments if name in names]:
        raise ConfigError("; ".join(former))


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
        return cast(T, parse(cls, values))
    except NotPlainError as error:
        problems.append(Problem(error.key, error.text))
    except ValidationError as error:
        problems += problems_of(cls, values, where, error)
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
            object.__setattr__(instance, name, parse(hint, value, text=False))
        except NotPlainError as invalid:
            problems.append(Problem(invalid.key, invalid.text))
        except ValidationError as invalid:
            problems.append(Problem(key, message_of(invalid.errors()[0], hint, value)))
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
        adapter(hint).validate_python(
            value.item() if isinstance(value, np.generic) else value, strict=True
        )
    except ValidationError:
        return False
    return True
