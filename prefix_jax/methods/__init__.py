"""Tuning methods, one file each. To add one, write a file and a line in `METHODS`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from prefix_jax.errors import ConfigError
from prefix_jax.methods.adapter import LlamaAdapter
from prefix_jax.methods.base import Method
from prefix_jax.methods.cartridge import Cartridge
from prefix_jax.methods.hidden import HiddenPrefixTuning
from prefix_jax.methods.multitask import MultitaskPromptTuning
from prefix_jax.methods.plus import PrefixTuningPlus
from prefix_jax.methods.prefix import PrefixTuning
from prefix_jax.methods.prompt import PromptTuning
from prefix_jax.methods.ptuning import PTuning
from prefix_jax.validation import build

__all__ = [
    "FULL",
    "METHODS",
    "Cartridge",
    "HiddenPrefixTuning",
    "LlamaAdapter",
    "Method",
    "MultitaskPromptTuning",
    "PTuning",
    "PrefixTuning",
    "PrefixTuningPlus",
    "PromptTuning",
    "make_method",
    "name_of",
    "section_of",
]

# Methods by their names in configs.
METHODS: dict[str, type[Method[Any]]] = {
    "prefix": PrefixTuning,
    "hidden": HiddenPrefixTuning,
    "prompt": PromptTuning,
    "ptuning": PTuning,
    "multitask": MultitaskPromptTuning,
    "adapter": LlamaAdapter,
    "cartridge": Cartridge,
    "plus": PrefixTuningPlus,
}

# Full fine-tuning, the baseline: no method; the backbone itself is trained.
FULL = "full"


def make_method(section: Mapping[str, Any]) -> Method[Any] | None:
    """Builds the method from the `method` section of a config; None for "full".

    Raises:
        ConfigError: the name or a field is unknown, or a value is out of range.
    """
    fields = dict(section)
    name = fields.pop("name")
    if name == FULL:
        if fields:
            raise ConfigError(f"method: full has no fields, got {', '.join(fields)}; remove them")
        return None
    if name not in METHODS:
        near = difflib.get_close_matches(name, [*METHODS, FULL], n=1)
        hint = f" did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"method.name: unknown method {name!r};{hint} use one of {', '.join([*METHODS, FULL])}"
        )
    return build(METHODS[name], fields, where="method")


def name_of(method: Method[Any] | None) -> str:
    """Returns the name under which a method is registered.

    Raises:
        ConfigError: the method is not registered.
    """
    if method is None:
        return FULL
    for name, cls in METHODS.items():
        if type(method) is cls:
            return name
    raise ConfigError(
        f"the method {type(method).__name__} is not registered in prefix_jax.methods.METHODS; add "
        "it there, under the name that configs and stored prefixes use"
    )


def section_of(method: Method[Any] | None) -> dict[str, Any]:
    """Returns the `method` section of a config for a method: the inverse of `make_method`.

    Raises:
        ConfigError: the method is not registered.
    """
    fields = () if method is None else dataclasses.fields(method)
    values = {field.name: getattr(method, field.name) for field in fields if field.init}
    return {"name": name_of(method), **values}
