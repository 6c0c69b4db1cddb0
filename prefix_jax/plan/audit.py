"""Whether a compiled training step does work, or holds memory, that a frozen backbone spares."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax

from prefix_jax.plan.hlo import Array, parse, temporaries
from prefix_jax.plan.products import Product, opaque, products


@dataclasses.dataclass(frozen=True)
class Audit:
    """What a compiled step computes and stores.

    Attributes:
        flops: of all matrix products, loops counted.
        opaque: custom calls whose products, if any, are not in `flops`.
        largest: the largest array that it fills on its way.
        weight_gradients: products as large as a matrix of the backbone: with the backbone frozen,
            there is none.
        weight_copies: arrays as large as a parameter of the backbone, all layers together, that
            the step fills: copies, conversions or gradients of it. There should be none.
        temp_bytes: what the step needs besides arguments and results.
        backbone_bytes: the backbone.
        train_elements: numbers that train.
        optimizer_elements: numbers that the optimizer keeps of them, scalars apart.
    """

    flops: int
    opaque: tuple[str, ...]
    largest: Array
    weight_gradients: tuple[Product, ...]
    weight_copies: tuple[Array, ...]
    temp_bytes: int
    backbone_bytes: int
    train_elements: int
    optimizer_elements: int


def audit(compiled: jax.stages.Compiled, backbone: Mapping[str, Any], state: Any) -> Audit:
    """Reads a compiled step.

    Arrays are told apart by their number of elements alone, since compilers transpose and merge
    axes: choose numbers of rows, tokens and targets that no axis of the weights has.

    Args:
        compiled: the step.
        backbone: the (abstract) weights, stacked.
        state: the (abstract) `TrainState`.

    Raises:
        ValueError: the backend shows neither text nor memory of what it compiled.
    """
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if text is None or memory is None:
        raise ValueError("this backend does not show what it compiled")
    module = parse(text)
    found, arrays = products(module), temporaries(module)
    layer, stored = _matrices(backbone)
    return Audit(
        flops=sum(product.flops for product in found),
        opaque=opaque(module),
        largest=arrays[0],
        weight_gradients=tuple(p for p in found if p.out.elements in layer | stored),
        weight_copies=tuple(array for array in arrays if array.elements in stored),
        temp_bytes=memory.temp_size_in_bytes,
        backbone_bytes=sum(
            leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) // 8
            for leaf in jax.tree.leaves(backbone)
        ),
        train_elements=_elements(jax.tree.leaves(state.train)),
        optimizer_elements=_elements(jax.tree.leaves(state.optimizer)),
    )


def _matrices(backbone: Mapping[str, Any]) -> tuple[set[int], set[int]]:
    """The sizes of the matrices of one layer, and of all matrices as they are stored."""
    layer, stored = set(), set()
    for path, leaf in jax.tree.leaves_with_path(backbone):
        # The integers and scales of a quantised one are attributes below its name.
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        stacked = "layers" in names
        if "bias" in names[-1] or leaf.ndim - stacked < 2:
            continue
        stored.add(leaf.size)
        if stacked:
            layer.add(leaf.size // leaf.shape[0])
    return layer, stored


def _elements(leaves: Collection[Any]) -> int:
    return sum(leaf.size for leaf in leaves if leaf.ndim)
