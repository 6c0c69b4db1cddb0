"""The high-level API: tune, save, load and use prefixes."""

from __future__ import annotations

from prefix_jax.api.engine import Engine
from prefix_jax.api.stored import import_peft, load_prefix
from prefix_jax.api.text import bake_text
from prefix_jax.api.training import fit
from prefix_jax.api.tuned import Prompt, Source, Tuned, bake

__all__ = [
    "Engine",
    "Prompt",
    "Source",
    "Tuned",
    "bake",
    "bake_text",
    "fit",
    "import_peft",
    "load_prefix",
]
