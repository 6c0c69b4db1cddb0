"""Configurations as text: a YAML file plus `key.path=value` overrides.

`load` reads, `dump` writes the resolved form, and `load(dump(c)) == c`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from prefix_jax.config.schema import Config, default_method
from prefix_jax.errors import ConfigError
from prefix_jax.typed import Problem, construct, hint_at, takes_text
from prefix_jax.untrusted.paths import read_text
from prefix_jax.untrusted.yaml import add_core_schema, parse_yaml

T = TypeVar("T")

_LIMIT = 2**20  # bytes of a config file


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration.

    Args:
        path: a YAML file; None starts from nothing.
        overrides: `key.path=value`, applied in order; values are YAML.

    Raises:
        ConfigError: every problem found, one a line.
    """
    if path is None:
        return parse({}, overrides, source="overrides")
    return parse(_read(Path(path)), overrides, source=str(path))


def parse(values: dict[str, Any], overrides: Sequence[str] = (), source: str = "config") -> Config:
    """Makes a configuration from nested mappings, as `load` does from a file.

    Args:
        values: by section.
        overrides: as for `load`.
        source: of the values, for messages.

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
        source: of the values, for messages.

    Raises:
        ConfigError: every problem found, one a line.
    """
    values = _spell_out(copy.deepcopy(values))
    given: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override {override!r}: expected key.path=value")
        _put(values, key, _override_value(cls, key, text), override)
        _spell_out(values)
        given[key] = f"override {override}"

    problems: list[Problem] = []
    config = construct(cls, values, "", problems)
    if config is None:
        raise ConfigError(
            "\n".join(f"{given.get(problem.key, source)}: {problem}" for problem in problems)
        )
    return config


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
        raise ConfigError(f"{path}: expected sections such as model: and data:, got {values!r:.80}")
    return values or {}


def _spell_out(values: dict[str, Any]) -> dict[str, Any]:
    """Spells out `method: full` as `method: {name: full}`, and `mesh: auto` as
    `mesh: {auto: true}`."""
    if isinstance(values.get("method"), str):
        values["method"] = {"name": values["method"]}
    if values.get("mesh") == "auto":
        values["mesh"] = {"auto": True}
    return values


def _override_value(cls: type, key: str, text: str) -> Any:
    try:
        value = parse_yaml(text, key, ConfigError)
    except ConfigError:
        return text
    # model.path=7 and data.input=[{x}] mean the text as it stands, although YAML sees more in it.
    as_it_stands = takes_text(hint_at(cls, key)) and not isinstance(value, str | None)
    return text if as_it_stands else value


def _put(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    """Sets a dotted key, making sections on the way."""
    *sections, name = key.split(".")
    if sections and sections[0] == "method":
        # By name alone: the override may name another, which need not have the same fields.
        values.setdefault("method", {"name": default_method()["name"]})
    for depth, section in enumerate(sections, 1):
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(
                f"override {override}: {'.'.join(sections[:depth])} is {values!r}, not a section"
            )
    values[name] = value
