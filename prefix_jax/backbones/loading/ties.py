"""Ties the token tables of a checkpoint.

Most models use one table for the token embeddings and, transposed, for the head; T5 and BART also
share it between encoder and decoder. A checkpoint may store it once, under any of its names, or
several times. As in transformers 5, tables that the configuration ties are not tied if they are
stored with different values.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Protocol

import numpy as np

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.families.names import NameTable, Shape

_CHUNK = 1 << 22  # values compared at a time


class _Source(Protocol):
    """A checkpoint of named tensors; see `weights.TensorSource`."""

    @property
    def shapes(self) -> dict[str, Shape]: ...

    def read(self, name: str) -> np.ndarray: ...


def resolve_ties(
    arch: Architecture, table: NameTable, checkpoint: _Source
) -> tuple[Architecture, NameTable]:
    """Compares the stored token tables and decides which of them are one.

    Args:
        arch: the architecture according to the configuration.
        table: the tensor names of its family.
        checkpoint: the stored tensors. Only the token tables are read, in chunks.

    Returns:
        The architecture with its actual ties, and the tensor names that each table is read from.

    Raises:
        BackboneError: a table has an unsupported dtype.
    """
    if table.tokens is None:
        return arch, table
    tokens = table.tokens
    actual = {table.plain(name): name for name in checkpoint.shapes}
    tied = set(tokens.stand_ins)
    if not arch.tied:
        tied.discard(tokens.head)
    shared = tokens.shared
    if shared not in actual:
        shared = next((n for n in tokens.stand_ins if n in tied and n in actual), shared)

    def same(name: str, other: str) -> bool:
        return name == other or (
            name in actual and other in actual and _equal(checkpoint, actual[name], actual[other])
        )

    def source(name: str | None, *others: str) -> str:
        """The tensor to read a table from: one of `others` if its values are the same."""
        if name is None or (name in tied and name not in actual):
            return shared
        return next((other for other in others if same(name, other)), name)

    decoder = source(tokens.decoder, shared)
    if arch.encoder is not None:
        encoder = source(tokens.encoder, shared, decoder)
        stack = dataclasses.replace(arch.encoder, own_tokens=encoder != decoder)
        arch = dataclasses.replace(arch, encoder=stack)
    else:
        encoder = decoder
    head = source(tokens.head, shared, decoder) if arch.tied else tokens.head
    arch = dataclasses.replace(arch, tied=arch.tied and head == decoder)
    used = {
        "embed/tokens_VD": decoder,
        "encoder/embed/tokens_VD": encoder,
        "head/unembed_DV": head,
    }
    rows = tuple(dataclasses.replace(row, name=used.get(row.path, row.name)) for row in table.rows)
    duplicates = ({tokens.shared} | tied) - set(used.values())
    ignored = (*table.ignored, *map(re.escape, sorted(duplicates)))
    return arch, dataclasses.replace(table, rows=rows, ignored=ignored)


def _equal(checkpoint: _Source, name: str, other: str) -> bool:
    """Compares two tensors, reading them only up to the first difference."""
    if checkpoint.shapes[name] != checkpoint.shapes[other]:
        return False
    x, y = checkpoint.read(name).reshape(-1), checkpoint.read(other).reshape(-1)
    same_dtype = x.dtype == y.dtype
    for start in range(0, len(x), _CHUNK):
        a, b = x[start : start + _CHUNK], y[start : start + _CHUNK]
        if not same_dtype:
            a, b = a.astype(np.float64), b.astype(np.float64)
        if not np.array_equal(a, b):
            return False
    return True
