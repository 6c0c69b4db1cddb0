"""Configurations as text: a YAML file plus `key.path=value` overrides.

`load` reads, `dump` writes the resolved form, and `load(dump(c)) == c`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml

from prefix_jax.config.schema import Config, default_method
from prefix_jax.errors import ConfigError, RenamedKeyError
from prefix_jax.untrusted.paths import read_text
from prefix_jax.untrusted.yaml import add_core_schema, parse_yaml
from prefix_jax.validation import Problem, accepts_text, construct, hint_at, plain, shown

T = TypeVar("T")

_LIMIT = 2**20  # bytes of a config file
_LONG = 200  # characters of an override that a message repeats


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration.

    Args:
        path: a YAML file; None starts from nothing.
        overrides: `key.path=value`, applied in order; values are YAML.

    Raises:
        ConfigError: every problem found, one a line.
    """
    if path is None:
        return parse({}, overrides, source="")
    return parse(_read(Path(path)), overrides, source=str(path))


def parse(values: dict[str, Any], overrides: Sequence[str] = (), source: str = "config") -> Config:
    """Makes a configuration from nested mappings, as `load` does from a file.

    Args:
        values: by section.
        overrides: as for `load`.
        source: of the values, for messages; "" if there are only overrides.

    Raises:
        ConfigError: every problem found, one a line.
    """
    return sections(Config, values, overrides, source)


def sections(
    cls: type[T], values: dict[str, Any], overrides: Sequence[str] = (), source: str = "config"
) -> T:
    """Makes some sections of a configuration, as `parse` makes all of them.

    Args:
        cls: a dataclass of sections: `Config`, or one with some of its fields.
        values: by section.
        overrides: as for `load`.
        source: of the values, for messages; "" if there are only overrides.

    Raises:
        ConfigError: every problem found, one a line.
    """
    try:
        values = _spell_out(plain(values))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    given: dict[str, str] = {}
    for override in overrides:
        key, equals, text = str(override).partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override {_shorten(override)}: expected key.path=value")
        try:
            _put(values, key, _override_value(cls, key, text))
        except ConfigError as error:
            raise ConfigError(f"override {_shorten(override)}: {error}") from None
        _spell_out(values)
        given[key] = str(override)

    problems: list[Problem] = []
    config = construct(cls, values, "", problems)
    if config is None:
        old = any(problem.renamed for problem in problems)
        raise (RenamedKeyError if old else ConfigError)(
            "\n".join(f"{_origin(problem, given, source)}: {problem}" for problem in problems)
        )
    return config


def _origin(problem: Problem, given: Mapping[str, str], source: str) -> str:
    """Names what set the values of a problem: an override, or the source with the overrides of
    the fields that the message mentions."""
    key = problem.key
    while key:
        if key in given:
            return f"override {_shorten(given[key])}"
        key = key.rpartition(".")[0]
    if problem.renamed or problem.text.startswith("unknown key"):
        for key, override in given.items():
            if key.startswith(f"{problem.key}."):
                return f"override {_shorten(override)}"
    words = set(re.findall(r"[\w.]+", problem.text))
    involved = [
        _shorten(override)
        for key, override in given.items()
        if key.startswith(f"{problem.key}." if problem.key else "")
        and {key, key.rpartition(".")[2]} & words
    ]
    if not involved:
        return source or "overrides"
    names = f"override{'s' * (len(involved) > 1)} {', '.join(involved)}"
    return f"{source} with {names}" if source else names


def _shorten(override: object) -> str:
    """An override in a message, printable and of bounded length."""
    text = str(override)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"


def dump(config: Config) -> str:
    """The resolved configuration as YAML, defaults included; `load` gives it back."""
    return yaml.dump(
        dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True
    )


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes what `parse_yaml` would otherwise read differently."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Line breaks written out: folded ones lose what kind of break they were (U+0085, U+2028).
        style = '"' if text.splitlines() not in ([text], []) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
add_core_schema(_Dumper)


def _read(path: Path) -> dict[str, Any]:
    values = parse_yaml(read_text(path, ConfigError, limit=_LIMIT), str(path), ConfigError)
    if not isinstance(values, dict | None):
        raise ConfigError(
            f"{path}: expected sections such as model: and data:, got {shown(values)}"
        )
    return values or {}


def _spell_out(values: Any) -> Any:
    """Spells out `method: full` as `method: {name: full}`, and `mesh: auto` as
    `mesh: {auto: true}`."""
    if isinstance(values, dict):
        if isinstance(values.get("method"), str):
            values["method"] = {"name": values["method"]}
        if values.get("mesh") == "auto":
            values["mesh"] = {"auto": True}
    return values


def _override_value(cls: type, key: str, text: str) -> Any:
    hint = hint_at(cls, key)
    if not text and accepts_text(hint) and type(None) not in get_args(hint):
        raise ConfigError(f"expected text after '='; write {key}=VALUE")
    try:
        value = parse_yaml(text, key, ConfigError)
    except ConfigError:
        _check_quotes(text, key)
        return text
    # model.path=7 and data.input=[{x}] mean the text itself, although YAML sees more in it.
    as_it_is = accepts_text(hint) and not isinstance(value, str | None)
    return text if as_it_is else value


def _check_quotes(text: str, key: str) -> None:
    """Raises ConfigError if text that is not YAML has lost one of the quotes around it."""
    for quote, other in (("'", '"'), ('"', "'")):
        starts, ends = text.startswith(quote), text.endswith(quote)
        if starts or (ends and text.count(quote) % 2):
            bare = text.strip(quote)
            raise ConfigError(
                f"the quote at the {'start' if starts else 'end'} has no partner; write "
                f"{key}={quote}{bare}{quote}, or to keep it as text {key}={other}{text}{other}; "
                "a shell removes one pair of quotes, so put another around the whole"
            )


def _put(values: Any, key: str, value: Any) -> None:
    """Sets a dotted key, making sections on the way."""
    *sections, name = key.split(".")
    if not isinstance(values, dict):
        raise ConfigError(f"there are no sections to change, but {shown(values)}")
    if sections and sections[0] == "method":
        # By name alone: the override may name another, which need not have the same fields.
        values.setdefault("method", {"name": default_method()["name"]})
    for depth, section in enumerate(sections, 1):
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"{'.'.join(sections[:depth])} is {shown(values)}, not a section")
    values[name] = value
