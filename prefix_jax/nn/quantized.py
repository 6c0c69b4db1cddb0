"""Weights in few bits, and the products that read them, plain or quantised.

    int8   one scale for each output of a product: the integers are multiplied as they are, and the
           scale falls on what comes out.
    int4   one scale and one zero for every few inputs of each output: a layer's weight is
           dequantised where it is used, and never a stack of them.

Only `x` of a product has a gradient under quantised weights: these are frozen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from prefix_jax.mesh import look_up
from prefix_jax.nn.remat import recomputed

Quantize = Literal["none", "int8", "int4"]

# The smallest normal bfloat16: what is smaller counts as zero, on some hardware in any case.
_TINY = 2.0**-126


@flax.struct.dataclass
class QTensor:
    """A weight that is stored in few bits: q times scale, plus zero, block by block.

    It stands in the parameter tree where the weight would. Linen compares the shape of a parameter
    with that of the first leaf, which is why `q` comes first.

    Attributes:
        q: int8 or int4, of the weight's shape.
        scale: of the dtype that one computes in and of `q`'s rank. Each of its axes divides that
            of `q`: [1, N, H] beside a `q_DNH` is one number for an output, and [D / 32, N, H] one
            for every 32 inputs of it.
        zero: what a q of 0 stands for, like `scale`; None for 0.
    """

    q: Any
    scale: Any
    zero: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        shape: tuple[int, ...] = self.q.shape
        return shape

    @property
    def size(self) -> int:
        """Of the weight: how many numbers it is."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """That one computes in."""
        dtype: np.dtype = self.scale.dtype
        return dtype


Weight = jax.Array | QTensor


def quantize(weight: Any, bits: Literal[4, 8], blocks: Sequence[int], dtype: Any) -> QTensor:
    """Rounds a weight to integers.

    Eight bits count from zero. Four have to make the most of a block's range, from its smallest
    value to its largest; so the blocks of a GGUF's Q4_1 survive as they are.

    Scales and zeros have bfloat16's precision whatever their dtype, and integers are rounded under
    them: one checkpoint gives the same numbers in float32 and in bfloat16.

    Args:
        weight: of any floating dtype: of numpy, which stays on the host, or of JAX.
        bits: of an integer.
        blocks: the number of blocks along every axis.
        dtype: of scales and zeros.
    """
    parts = _split(weight.astype(np.float32), blocks)
    inside = tuple(range(1, parts.ndim, 2))
    if bits == 8:
        top = abs(parts).max(axis=inside, keepdims=True)
        scale = _representable(top * np.float32(1 / 127))
        q, zero, bounds = parts * (1 / scale), None, (-127, 127)
    else:
        low = parts.min(axis=inside, keepdims=True)
        top = parts.max(axis=inside, keepdims=True)
        scale = _representable((top - low) * np.float32(1 / 15))
        zero = _bfloat16(low + 8 * scale)
        q, bounds = (parts - zero) * (1 / scale), (-8, 7)
    return QTensor(
        q.round().clip(*bounds).reshape(weight.shape).astype(jnp.int8 if bits == 8 else jnp.int4),
        scale.reshape(tuple(blocks)).astype(dtype),
        None if zero is None else zero.reshape(tuple(blocks)).astype(dtype),
    )


def quantize_like(weight: Any, like: QTensor) -> QTensor:
    """Quantises a weight as an (abstract) one is, of which it may be a layer and some outputs."""
    bits: Literal[4, 8] = 8 if like.q.dtype == jnp.int8 else 4
    sizes, counts = like.shape[-weight.ndim :], like.scale.shape[-weight.ndim :]
    axes = zip(weight.shape, sizes, counts, strict=True)
    blocks = [own if count == size else count for own, size, count in axes]
    return quantize(weight, bits, blocks, like.dtype)


def _representable(scale: Any) -> Any:
    return _bfloat16(scale.clip(_TINY))


def _bfloat16(x: Any) -> Any:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def dequantize(weight: QTensor) -> jax.Array:
    """The weight, in the dtype of its scales."""
    blocks = weight.scale.shape
    parts = _split(weight.q.astype(weight.dtype), blocks) * _split(weight.scale, blocks)
    if weight.zero is not None:
        parts = parts + _split(weight.zero, blocks)
    return parts.reshape(weight.shape)


def _split(array: Any, blocks: Sequence[int]) -> Any:
    """Every axis in two: the blocks, and what is inside of one."""
    sizes = zip(blocks, array.shape, strict=True)
    return array.reshape([n for count, size in sizes for n in (count, size // count)])


def matmul(
    x: jax.Array,
    weight: Weight,
    inputs: int = 1,
    *,
    transposed: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """The product of x [..., *in] and a weight [*in, *out]: [..., *out].

    Args:
        x: of the weight's dtype.
        weight: plain or quantised.
        inputs: how many axes of the weight are inputs.
        transposed: the weight, a matrix, is [out, in].
        dtype: of the result; None for that of `x`.
    """
    out = weight.shape[:1] if transposed else weight.shape[inputs:]
    spec = "...i,oi->...o" if transposed else "...i,io->...o"

    def product(x: jax.Array, weight: Weight) -> jax.Array:
        after = None
        if isinstance(weight, QTensor):
            per_output = weight.zero is None and weight.scale.size == math.prod(out)
            after = weight.scale.reshape(-1) if per_output else None
            weight = weight.q.astype(x.dtype) if per_output else dequantize(weight)
        if not transposed:
            # As one product of matrices: an einsum over N and H apart makes XLA transpose the
            # weight at every use.
            weight = weight.reshape(-1, math.prod(out))
        x = x.reshape(*x.shape[: x.ndim - inputs], -1)
        y = jnp.einsum(spec, x, weight, preferred_element_type=dtype)
        y = y if after is None else y * after
        return y.reshape(*y.shape[:-1], *out)

    if isinstance(weight, QTensor) or len(weight.shape) > 2:
        # The weight is flattened, and dequantised, again in the backward pass, where a scan would
        # otherwise have kept a copy of every layer's.
        return recomputed(product)(x, weight)
    return product(x, weight)


def take(table: Weight, ids: jax.Array) -> jax.Array:
    """Rows of a table [V, D]: x_BTD for ids_BT, in the dtype of the table."""
    rows: Weight = jax.tree.map(lambda leaf: look_up(leaf, ids), table)
    return dequantize(rows) if isinstance(rows, QTensor) else rows
