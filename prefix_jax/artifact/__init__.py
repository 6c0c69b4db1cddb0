"""A prefix on disk: a directory with `prefix.json`, for people and programs, and its arrays.

    prefix.json            a `Card`: what the prefix is and which backbone it belongs to
    arrays/                the arrays, float32, in Orbax's format
    prefix.safetensors     or these, if asked for

What is stored is what the method produces without dropout, so nothing of the method is needed to
use it: an MLP that computed keys and values in training is gone. Of a task with labels the arrays
of its head lie beside those of the prefix, under names that begin with "head.".
`docs/export.md` says how to read
a prefix without this package.
"""

from __future__ import annotations

from prefix_jax.artifact.arrays import Kind, PrefixSpec, prefix_spec
from prefix_jax.artifact.card import (
    FORMAT_VERSION,
    BackboneCard,
    Card,
    TaskCard,
    TemplateCard,
    TokenizerCard,
    check,
    make_card,
)
from prefix_jax.artifact.store import PREFIXES, Container, find, load, load_head, save

__all__ = [
    "FORMAT_VERSION",
    "PREFIXES",
    "BackboneCard",
    "Card",
    "Container",
    "Kind",
    "PrefixSpec",
    "TaskCard",
    "TemplateCard",
    "TokenizerCard",
    "check",
    "find",
    "load",
    "load_head",
    "make_card",
    "prefix_spec",
    "save",
]
