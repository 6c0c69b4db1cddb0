"""The stored form of a prefix: a directory with a readable card and float32 arrays.

    prefix.json            the `Card`: describes the prefix and the backbone it belongs to
    arrays/                the arrays in Orbax's format (the default), or
    prefix.safetensors     the arrays in safetensors format
    ngrams.safetensors     optional: an n-gram table of the training targets, for faster decoding

The arrays are the output of the method without dropout, so the method is not needed to use them:
an MLP that computes keys and values in training is not stored. If the task has a head, its arrays
are stored with those of the prefix, under names that begin with "head.". `docs/export.md` shows
how to read a prefix without this package.
"""

from __future__ import annotations

from prefix_jax.artifact.arrays import Kind, PrefixSpec, digest, prefix_spec
from prefix_jax.artifact.card import (
    FORMAT_VERSION,
    BackboneCard,
    Card,
    DatasetCard,
    TokenizerCard,
    check,
    make_card,
)
from prefix_jax.artifact.store import (
    PREFIXES,
    Container,
    find,
    load,
    load_head,
    load_ngrams,
    refuse_existing,
    save,
    stored_bytes,
)

__all__ = [
    "FORMAT_VERSION",
    "PREFIXES",
    "BackboneCard",
    "Card",
    "Container",
    "DatasetCard",
    "Kind",
    "PrefixSpec",
    "TokenizerCard",
    "check",
    "digest",
    "find",
    "load",
    "load_head",
    "load_ngrams",
    "make_card",
    "prefix_spec",
    "refuse_existing",
    "save",
    "stored_bytes",
]
