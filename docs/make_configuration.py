"""Writes `docs/configuration.md` from the dataclasses that read a config.

python docs/make_configuration.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from prefix_jax import config
from prefix_jax.methods import METHODS
from prefix_jax.tasks import TASKS
from prefix_jax.validation import describe

PAGE = Path(__file__).parent / "configuration.md"

_INTRODUCTION = """\
# Configuration

<!-- Written by docs/make_configuration.py; a test compares. -->

A YAML file with the sections below configures a run. Override keys by `section.key=value` on the
command line or in `pj.fit(…, overrides=[…])`. The run directory stores the resolved form as
`config.yaml`. [configs/quickstart.yaml](../configs/quickstart.yaml) is an example.

The key `output_dir` (required, outside the sections) is the run directory, local or
`gs://BUCKET/PATH`.
"""


def page() -> str:
    """The whole page."""
    hints = get_type_hints(config.Config)
    parts = [_INTRODUCTION]
    for field in dataclasses.fields(config.Config):
        if field.name == "method":
            parts += [_section(f"method: {name}", cls, "method") for name, cls in METHODS.items()]
            parts.append("### method: full\n\nThe whole backbone trains: no prefix, no keys.\n")
        elif dataclasses.is_dataclass(hints[field.name]):
            parts.append(_section(field.name, hints[field.name], field.name))
    return "\n".join(parts)


def _section(title: str, cls: Any, key: str) -> str:
    hints, texts = get_type_hints(cls, include_extras=True), _attributes(cls)
    rows = [
        f"| `{key}.{field.name}` | {_values(f'{key}.{field.name}', hints[field.name])} "
        f"| {_default(field)} | {texts[field.name]} |"
        for field in dataclasses.fields(cls)
        if field.init
    ]
    summary = inspect.cleandoc(cls.__doc__).partition("\n\n")[0].replace("\n", " ")
    table = ["| key | value | default | |", "|---|---|---|---|", *rows]
    return f"### {title}\n\n{summary}\n\n" + "\n".join(table) + "\n"


def _values(key: str, hint: Any) -> str:
    """The type of a field in words, without articles."""
    if key == "evaluate.metrics":  # depends on the task, which checks it
        names = dict.fromkeys(name for task in TASKS.values() for name in task().metrics)
        return f"list of any of {', '.join(names)}"
    return re.sub(r"\ban? (?!section)", "", describe(hint))


def _default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}`"


def _attributes(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each attribute."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
            texts[name] = re.sub(r"\s+", " ", text.replace("None", "null")).replace("|", "\\|")
    return texts


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
