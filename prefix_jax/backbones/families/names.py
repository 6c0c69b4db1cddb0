"""Tensor names of a checkpoint: a table with one row per parameter.

A row has the tensor's name in the checkpoint (`{l}` is the layer), the parameter's path, and how
the checkpoint stores it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight of a matrix product, stored with its axes flattened to two.

    Attributes:
        inputs: the number of leading axes that are inputs: 1 for `q_DNH`, 2 for `o_NHD`.
        transposed: whether it is stored [out, in], as by `torch.nn.Linear`, or [in, out], as
            embeddings and GPT-2's `Conv1D`.
        part, parts: the index of this parameter among several that are fused along the outputs.
        by_head: whether they are fused head by head (GPT-NeoX), not one after the other.
        interleaved: whether the halves of each head's rotary dimensions are interleaved, as
            llama.cpp stores them.
    """

    inputs: int = 1
    transposed: bool = True
    part: int = 0
    parts: int = 1
    by_head: bool = False
    interleaved: bool = False

    def stored(self, shape: Shape) -> Shape:
        """The shape of the stored tensor, given the shape of the parameter."""
        rows, columns = math.prod(shape[: self.inputs]), math.prod(shape[self.inputs :])
        return (columns * self.parts, rows) if self.transposed else (rows, columns * self.parts)

    def __call__(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        """Converts the stored tensor to the parameter, as a view if strides can express it."""
        x = x.T if self.transposed else x
        if self.by_head:
            return _of_heads(x, self.part, self.parts, shape)
        columns = x.shape[1] // self.parts
        x = x[:, self.part * columns : (self.part + 1) * columns]
        return _split_halves(x, shape) if self.interleaved else x.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Vector:
    """A bias or a scale, stored flat.

    Attributes:
        part, parts, by_head, interleaved: as in `Matrix`.
        excess: subtracted from the stored values: llama.cpp adds 1 to the scales of Gemma's norms.
    """

    part: int = 0
    parts: int = 1
    by_head: bool = False
    interleaved: bool = False
    excess: float = 0.0

    def stored(self, shape: Shape) -> Shape:
        """The shape of the stored tensor, given the shape of the parameter."""
        return (math.prod(shape) * self.parts,)

    def __call__(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        """Converts the stored tensor to the parameter."""
        if self.by_head:
            return _of_heads(x, self.part, self.parts, shape)
        x = x.reshape(self.parts, -1)[self.part]
        x = x - np.float32(self.excess) if self.excess else x
        return _split_halves(x, shape) if self.interleaved else x.reshape(shape)


def _of_heads(x: np.ndarray, part: int, parts: int, shape: Shape) -> np.ndarray:
    """One part of outputs [..., N * parts * H] that are fused within each head."""
    N, H = shape[-2:]
    return x.reshape(*x.shape[:-1], N, parts, H)[..., part, :].reshape(shape)


def _split_halves(x: np.ndarray, shape: Shape) -> np.ndarray:
    """Undoes llama.cpp's reordering of the last axis, H, from (half, H/2) to (H/2, half)."""
    *heads, H = shape
    return x.reshape(*heads, H // 2, 2).swapaxes(-1, -2).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: its name in the checkpoint, its path with slashes, and its storage."""

    name: str
    path: str
    storage: Matrix | Vector


@dataclasses.dataclass(frozen=True)
class TokenTables:
    """The names of token tables that may be the same table; see `resolve_ties`.

    Attributes:
        shared: the table that the others are tied to.
        head: the output projection.
        encoder, decoder: the stacks' own tables; None if there is only `shared`.
        stand_ins: the names that transformers tries, in this order, if `shared` is not stored.
    """

    shared: str
    head: str
    encoder: str | None = None
    decoder: str | None = None
    stand_ins: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class NameTable:
    """The tensor names of one family in one file format.

    Attributes:
        rows: every parameter of any model of the family.
        prefix: optional start of each name (checkpoints of the bare model omit it).
        tokens: the token tables that may be tied; None if the format stores no tied tables.
        ignored: patterns of tensors that are not loaded.
        spellings: alternative endings of names, with the usual ones.
    """

    rows: tuple[Row, ...]
    prefix: str = ""
    tokens: TokenTables | None = None
    ignored: tuple[str, ...] = ()
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def plain(self, name: str) -> str:
        """Converts a name in the checkpoint to the spelling of the rows."""
        name = name.removeprefix(self.prefix)
        for ending, usual in self.spellings.items():
            if name.endswith(ending):
                return name.removesuffix(ending) + usual
        return name


# The storage of most weights: as in `torch.nn.Linear`, as they are used, and flat.
LINEAR, STORED, VECTOR = Matrix(), Matrix(transposed=False), Vector()


def linear_rows(
    stored: str, path: str, axes: str, bias_axes: str, storage: Matrix = LINEAR
) -> tuple[Row, Row]:
    """Weight and bias of a linear layer, such as "layers/mlp/up" with axes "DF" and "F"."""
    return (
        Row(f"{stored}.weight", f"{path}_{axes}", storage),
        Row(f"{stored}.bias", f"{path}_bias_{bias_axes}", VECTOR),
    )


def norm_rows(stored: str, path: str) -> tuple[Row, Row]:
    """Scale and bias of a layer norm, such as "final_norm"."""
    return (
        Row(f"{stored}.weight", f"{path}/scale_D", VECTOR),
        Row(f"{stored}.bias", f"{path}/bias_D", VECTOR),
    )


def attention_rows(stored: str, path: str, out: str = "o_proj") -> tuple[Row, ...]:
    """Projections of queries, keys, values and the output, each a linear layer of its own."""
    return (
        *linear_rows(f"{stored}.q_proj", f"{path}/q", "DNH", "NH"),
        *linear_rows(f"{stored}.k_proj", f"{path}/k", "DKH", "KH"),
        *linear_rows(f"{stored}.v_proj", f"{path}/v", "DKH", "KH"),
        *linear_rows(f"{stored}.{out}", f"{path}/o", "NHD", "D", Matrix(2)),
    )
