"""Checks a compiled training step for work and memory that a frozen backbone makes unnecessary."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax

from prefix_jax.plan.hlo import Array, parse, temporaries
from prefix_jax.plan.products import Product, opaque, products


@dataclasses.dataclass(frozen=True)
class Audit:
    """Computation and memory of a compiled step.

    Attributes:
        flops: operations of all matrix products, with loop bodies counted at every iteration.
        opaque: custom calls whose products, if any, are not in `flops`.
        largest: the largest temporary array.
        weight_gradients: products as large as a matrix of the backbone. Empty if the backbone is
            frozen.
        weight_copies: temporary arrays as large as a stacked parameter of the backbone: copies,
            conversions or gradients. Should be empty.
        temp_bytes: memory in addition to arguments and results.
        backbone_bytes: size of the backbone.
        train_elements: number of trainable parameters.
        optimizer_elements: number of elements in the optimizer state, without scalars.
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
    """Audits a compiled step.

    Arrays are identified only by their number of elements, because compilers transpose and merge
    axes. Choose numbers of rows, tokens and targets that differ from all axes of the weights.

    Args:
        compiled: the step.
        backbone: the (abstract) weights, stacked.
        state: the (abstract) `TrainState`.

    Raises:
        ValueError: the backend does not provide the compiled text or memory statistics.
    """
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if text is None or memory is None:
        raise ValueError("this backend provides no compiled text or memory statistics")
    module = parse(text)
    counted, arrays = products(module), temporaries(module)
    layer, stored = _matrices(backbone)
    return Audit(
        flops=sum(product.flops for product in counted),
        opaque=opaque(module),
        largest=arrays[0],
        weight_gradients=tuple(p for p in counted if p.out.elements in layer | stored),
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
    """The sizes of the matrices of one layer, and of all matrices as stored (stacked)."""
    layer, stored = set(), set()
    for path, leaf in jax.tree.leaves_with_path(backbone):
        # The integers and scales of a quantised parameter are attributes below its name.
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
