"""Decides which of a checkpoint's token tables are one.

Most models use one table to embed tokens and, transposed, as their head; T5 and BART share it
between encoder and decoder too. A checkpoint may store it once, under any of its names, or several
times. As in transformers 5, tables that the configuration ties but that are stored with different
values are not tied.
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
    """A checkpoint of named tensors: see `weights.TensorSource`."""

    @property
    def shapes(self) -> dict[str, Shape]: ...

    def read(self, name: str) -> np.ndarray: ...


def resolve_ties(
    arch: Architecture, table: NameTable, checkpoint: _Source
) -> tuple[Architecture, NameTable]:
    """Compares the token tables that a checkpoint stores.

    Args:
        arch: the architecture as the configuration describes it.
        table: the names of its family.
        checkpoint: the stored tensors, of which only the token tables are read, in chunks.

    Returns:
        The architecture with a head or an encoder's table of its own where it is stored, and the
        names with the tensor that each table is read from.

    Raises:
        BackboneError: a table is stored in a dtype that is not supported.
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
        """The tensor to read a table from, one of `others` if it has the same values."""
        if name is None or (name in tied and name not in actual):
            return shared
        return next((other for other in others if same(name, other)), name)

    decoder = source(tokens.decoder, shared)
    if arch.encoder is not None:
        encoder = source(tokens.encoder, shared, decoder)
        own = dataclasses.replace(arch.encoder, own_tokens=encoder != decoder)
        arch = dataclasses.replace(arch, encoder=own)
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
    """Whether two tensors hold the same values. Both are mapped, and read until they differ."""
    if checkpoint.shapes[name] != checkpoint.shapes[other]:
        return False
    x, y = checkpoint.read(name).reshape(-1), checkpoint.read(other).reshape(-1)
    alike = x.dtype == y.dtype
    for start in range(0, len(x), _CHUNK):
        a, b = x[start : start + _CHUNK], y[start : start + _CHUNK]
        if not alike:
            a, b = a.astype(np.float64), b.astype(np.float64)
        if not np.array_equal(a, b):
            return False
    return True
