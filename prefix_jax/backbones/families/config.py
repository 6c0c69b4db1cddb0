"""Completes a configuration that omits keys or spells them differently.

transformers fills the keys that a `config.json` omits from the defaults of its configuration
classes. Each family lists those that it reads, with values on which transformers 5.10 to 5.23
agree; `tests/backbones/families/test_defaults.py` compares them with the installed version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def complete(
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    spellings: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Returns a configuration with its usual spellings and with defaults.

    Args:
        config: the content of a `config.json`.
        defaults: values of omitted keys.
        spellings: other names that transformers accepts, with the usual ones. The other name wins
            if both are given.
    """
    renamed = {usual: config[name] for name, usual in (spellings or {}).items() if name in config}
    return {**defaults, **config, **renamed}
