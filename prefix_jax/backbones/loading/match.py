"""Matches the tensors of a checkpoint with the parameters of a backbone.

Everything is checked against the shapes in the checkpoint's headers before any weight is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from flax.traverse_util import flatten_dict

from prefix_jax.backbones.families.names import Matrix, NameTable, Shape, Vector
from prefix_jax.errors import BackboneError

_NAMES_IN_MESSAGE = 20


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter and the tensors that it is read from.

    Attributes:
        path: the path in the parameter tree.
        shape: the shape of the parameter, including the axis of layers.
        names: the tensors in the checkpoint: one per layer if `stacked`, else one.
        storage: how each tensor is stored.
        stacked: whether the leading axis is the layer.
    """

    path: tuple[str, ...]
    shape: Shape
    names: tuple[str, ...]
    storage: Matrix | Vector
    stacked: bool


def match(
    table: NameTable, params: Mapping, stored: Mapping[str, Shape], where: str
) -> list[Parameter]:
    """Finds the tensors of every parameter.

    Args:
        table: the names.
        params: the parameter tree, of leaves with a shape. Parameters under "layers" have a leading
            axis of layers.
        stored: the shape of every tensor in the checkpoint.
        where: the checkpoint, for messages.

    Raises:
        BackboneError: tensors are missing, unexpected or of another shape; it lists all of them.
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
    parameters: list[Parameter] = []
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
        parameters.append(Parameter(path, shape, sources, row.storage, stacked))
    ignored = re.compile("|".join(table.ignored) or r"(?!)")
    unexpected = [
        actual[name] for name in actual if name not in used and not ignored.fullmatch(name)
    ]
    problems = [
        _describe(kind, names)
        for kind, names in (
            ("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshapen)
        )
        if names
    ]  # fmt: skip
    if problems:
        raise BackboneError(
            f"the tensors in {where} do not fit its configuration\n" + "\n".join(problems)
        )
    return parameters


def _describe(kind: str, names: Iterable[str]) -> str:
    names = sorted(set(names), key=_natural)
    lines = [f"  {len(names)} {kind}:", *(f"    {name}" for name in names[:_NAMES_IN_MESSAGE])]
    if len(names) > _NAMES_IN_MESSAGE:
        lines.append(f"    … and {len(names) - _NAMES_IN_MESSAGE} more")
    return "\n".join(lines)


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(int(digits or 0), text) for text, digits in re.findall(r"(\D+)(\d*)", name)]
