"""Reads and writes configurations: YAML with `key.path=value` overrides.

`load` reads, `dump` writes the resolved form with all defaults, and reading that gives the same
configuration.
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

_MAX_BYTES = 2**20  # of a config file
_MAX_SHOWN = 200  # characters of an override in a message


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration.

    Args:
        path: a YAML file; None for overrides only.
        overrides: `key.path=value`, applied in order; values are YAML.

    Raises:
        ConfigError: every problem, one per line.

    Examples:
        >>> import prefix_jax as pj
        >>> config = pj.load_config("configs/quickstart.yaml", ["train.steps=500"])
        >>> config.train.steps
        500
    """
    if path is None:
        return parse({}, overrides, source="")
    return parse(_read(Path(path)), overrides, source=str(path))


def parse(values: dict[str, Any], overrides: Sequence[str] = (), source: str = "config") -> Config:
    """Builds a configuration from nested mappings.

    Args:
        values: sections by name.
        overrides: see `load`.
        source: where the values come from, for messages; "" if there are only overrides.

    Raises:
        ConfigError: every problem, one per line.
    """
    return sections(Config, values, overrides, source)


def sections(
    cls: type[T], values: dict[str, Any], overrides: Sequence[str] = (), source: str = "config"
) -> T:
    """Builds some sections of a configuration; see `parse`.

    Args:
        cls: `Config`, or a dataclass with some of its fields.
        values: sections by name.
        overrides: see `load`.
        source: where the values come from, for messages; "" if there are only overrides.

    Raises:
        ConfigError: every problem, one per line.
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
    """Names the source of a problem: an override, or the file with the overrides of the fields that
    the message mentions."""
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
    """Formats an override for a message, printable and of bounded length."""
    text = str(override)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def dump(config: Config) -> str:
    """Formats the resolved configuration as YAML, including defaults."""
    return yaml.dump(
        dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True
    )


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes text that `parse_yaml` would read as another type."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Escapes line breaks: YAML folds U+0085 and U+2028 into plain ones.
        style = '"' if text.splitlines() not in ([text], []) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
add_core_schema(_Dumper)


def _read(path: Path) -> dict[str, Any]:
    values = parse_yaml(read_text(path, ConfigError, limit=_MAX_BYTES), str(path), ConfigError)
    if not isinstance(values, dict | None):
        raise ConfigError(
            f"{path}: expected sections such as model: and data:, got {shown(values)}"
        )
    return values or {}


def _spell_out(values: Any) -> Any:
    """Expands `method: NAME` to `method: {name: NAME}`, `mesh: auto` to `mesh: {auto: true}`."""
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
    # model.path=7 and data.input=[{x}] are texts, although they are other types in YAML.
    literal = accepts_text(hint) and not isinstance(value, str | None)
    return text if literal else value


def _check_quotes(text: str, key: str) -> None:
    """Raises ConfigError if text that is not YAML has a quote at only one end."""
    for quote, other in (("'", '"'), ('"', "'")):
        starts, ends = text.startswith(quote), text.endswith(quote)
        if starts or (ends and text.count(quote) % 2):
            bare = text.strip(quote)
            raise ConfigError(
                f"the quote at the {'start' if starts else 'end'} is unmatched; write "
                f"{key}={quote}{bare}{quote}, or to keep the quote {key}={other}{text}{other}; a "
                "shell removes one pair of quotes, so put another pair around the override"
            )


def _put(values: Any, key: str, value: Any) -> None:
    """Sets a dotted key and creates missing sections."""
    *sections, name = key.split(".")
    if not isinstance(values, dict):
        raise ConfigError(f"expected sections to override, got {shown(values)}")
    if sections and sections[0] == "method":
        # Without the default's fields: the override may select a method with other fields.
        values.setdefault("method", {"name": default_method()["name"]})
    for depth, section in enumerate(sections, 1):
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"{'.'.join(sections[:depth])} is {shown(values)}, not a section")
    values[name] = value
