"""How the tensors of a checkpoint become the parameters of a backbone.

A table has one row per parameter: the tensor's name in the checkpoint (`{l}` stands for the layer),
the parameter's path, and how the one is stored in the other. Everything is checked against the
shapes in the checkpoint's headers before any weight is read.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np
from flax.traverse_util import flatten_dict

from prefix_jax.errors import BackboneError

Shape = tuple[int, ...]
_LISTED = 20


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight of a matrix product, stored with its axes flattened to two.

    Attributes:
        inputs: how many leading axes of the parameter are inputs: 1 for `q_DNH`, 2 for `o_NHD`.
        transposed: stored [out, in], as `torch.nn.Linear` does; else [in, out], as embeddings and
            GPT-2's `Conv1D` are.
        part, parts: the parameter is one of several fused along the outputs.
        by_head: they are fused head by head (GPT-NeoX), and not one behind the other.
        interleaved: llama.cpp stores the two halves of each head's rotary dimensions interleaved.
    """

    inputs: int = 1
    transposed: bool = True
    part: int = 0
    parts: int = 1
    by_head: bool = False
    interleaved: bool = False

    def stored(self, shape: Shape) -> Shape:
        """The shape in the checkpoint of a parameter of this shape."""
        rows, columns = math.prod(shape[: self.inputs]), math.prod(shape[self.inputs :])
        return (columns * self.parts, rows) if self.transposed else (rows, columns * self.parts)

    def __call__(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        """The parameter, as a view of the stored tensor wherever strides can express it."""
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
        excess: what the stored one is larger by: llama.cpp adds 1 to the scales of Gemma's norms.
    """

    part: int = 0
    parts: int = 1
    by_head: bool = False
    interleaved: bool = False
    excess: float = 0.0

    def stored(self, shape: Shape) -> Shape:
        """The shape in the checkpoint of a parameter of this shape."""
        return (math.prod(shape) * self.parts,)

    def __call__(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        """The parameter, from the stored tensor."""
        if self.by_head:
            return _of_heads(x, self.part, self.parts, shape)
        x = x.reshape(self.parts, -1)[self.part]
        x = x - np.float32(self.excess) if self.excess else x
        return _split_halves(x, shape) if self.interleaved else x.reshape(shape)


def _of_heads(x: np.ndarray, part: int, parts: int, shape: Shape) -> np.ndarray:
    """One part of outputs that are fused within each head, [..., N * parts * H]."""
    N, H = shape[-2:]
    return x.reshape(*x.shape[:-1], N, parts, H)[..., part, :].reshape(shape)


def _split_halves(x: np.ndarray, shape: Shape) -> np.ndarray:
    """Undoes llama.cpp's reordering of the last axis, H, from (half, H/2) to (H/2, half)."""
    *heads, H = shape
    return x.reshape(*heads, H // 2, 2).swapaxes(-1, -2).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: its name in the checkpoint, its path with slashes, how it is stored."""

    name: str
    path: str
    storage: Matrix | Vector


@dataclasses.dataclass(frozen=True)
class TokenTables:
    """The names of token tables that may be one table: see `ties.resolve_ties`.

    Attributes:
        shared: the table that the others are tied to.
        head: the output projection.
        encoder, decoder: the stacks' own; None where there is only `shared`.
        stand_ins: the names in the order in which transformers looks for one that is stored, where
            `shared` is not.
    """

    shared: str
    head: str
    encoder: str | None = None
    decoder: str | None = None
    stand_ins: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class NameTable:
    """The checkpoint names of one family in one format.

    Attributes:
        rows: every parameter that some model of the family has.
        prefix: may stand before each name (checkpoints of the bare model leave it out).
        tokens: the token tables that may be one; None where the format stores them as used.
        ignored: patterns of tensors that hold nothing to load.
        spellings: endings of names that some checkpoints have, and what they are here.
    """

    rows: tuple[Row, ...]
    prefix: str = ""
    tokens: TokenTables | None = None
    ignored: tuple[str, ...] = ()
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def plain(self, name: str) -> str:
        """A name in the checkpoint as the rows have it."""
        name = name.removeprefix(self.prefix)
        for ending, usual in self.spellings.items():
            if name.endswith(ending):
                return name.removesuffix(ending) + usual
        return name


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Where one parameter comes from.

    Attributes:
        path: in the parameter tree.
        shape: of the parameter, with the layers' axis.
        names: the tensors in the checkpoint; one for each layer if `stacked`, else one.
        storage: how each of them is stored.
        stacked: whether the leading axis counts layers.
    """

    path: tuple[str, ...]
    shape: Shape
    names: tuple[str, ...]
    storage: Matrix | Vector
    stacked: bool


def match(
    table: NameTable, params: Mapping, stored: Mapping[str, Shape], where: str
) -> list[Parameter]:
    """Finds the checkpoint's tensors for every parameter.

    Args:
        table: the names.
        params: the parameter tree, of anything that has a shape. Parameters under "layers" have
            a leading axis of layers.
        stored: the shape of every tensor in the checkpoint.
        where: the checkpoint, for messages.

    Raises:
        BackboneError: tensors are missing, unexpected or of another shape; all are listed.
    """
    actual: dict[str, str] = {}
    for name in stored:
        other = actual.setdefault(table.plain(name), name)
        if other != name:
            raise BackboneError(
                f"{where}: the tensors {other} and {name} are two spellings of one parameter; "
                "remove one of them from the checkpoint"
            )
    rows = {tuple(row.path.split("/")): row for row in table.rows}
    found: list[Parameter] = []
    missing: list[str] = []
    misshapen: list[str] = []
    used: set[str] = set()
    for path, leaf in flatten_dict(dict(params)).items():
        row, shape = rows[path], tuple(leaf.shape)
        stacked = "layers" in path
        count = shape[0] if stacked else 1
        names = [row.name.format(l=layer) for layer in range(count)]
        expected = row.storage.stored(shape[1:] if stacked else shape)
        used.update(names)
        missing += [name for name in names if name not in actual]
        misshapen += [
            f"{name}: {stored[actual[name]]} instead of {expected}"
            for name in names
            if name in actual and stored[actual[name]] != expected
        ]
        sources = tuple(actual.get(name, name) for name in names)
        found.append(Parameter(path, shape, sources, row.storage, stacked))
    ignored = re.compile("|".join(table.ignored) or r"(?!)")
    unexpected = [
        actual[name] for name in actual if name not in used and not ignored.fullmatch(name)
    ]
    problems = [
        _listed(kind, names)
        for kind, names in (
            ("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshapen)
        )
        if names
    ]  # fmt: skip
    if problems:
        raise BackboneError(
            f"the tensors in {where} do not fit its configuration\n" + "\n".join(problems)
        )
    return found


def _listed(kind: str, names: Iterable[str]) -> str:
    names = sorted(set(names), key=_natural)
    lines = [f"  {len(names)} {kind}:", *(f"    {name}" for name in names[:_LISTED])]
    if len(names) > _LISTED:
        lines.append(f"    … and {len(names) - _LISTED} more")
    return "\n".join(lines)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(digits or 0), text) for text, digits in re.findall(r"(\D+)(\d*)", name)]


# How most weights are stored: as torch's Linear does, as they are used, and flat.
LINEAR, STORED, VECTOR = Matrix(), Matrix(transposed=False), Vector()
