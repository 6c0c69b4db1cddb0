"""Quantised weights, and matrix products with plain or quantised weights.

    int8   one scale per output of a product: the integers are multiplied directly, and the scale
           is applied to the result.
    int4   one scale and one zero point per block of inputs of each output: one layer's weight is
           dequantised at its use, never a whole stack.

Quantised weights are frozen, so a product is differentiable only in `x`.
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

# The smallest normal bfloat16: some hardware flushes smaller values to zero.
_TINY = 2.0**-126


@flax.struct.dataclass
class QTensor:
    """A block-quantised weight: q * scale + zero.

    It replaces the weight in the parameter tree. Linen checks the shape of a parameter against its
    first leaf, so `q` must come first.

    Attributes:
        q: int8 or int4, with the shape of the weight.
        scale: in the compute dtype, with the rank of `q`. Each axis of `scale` divides that of `q`:
            for a `q_DNH`, [1, N, H] is one scale per output and [D / 32, N, H] one per 32 inputs of
            each output.
        zero: the value that q = 0 represents, shaped like `scale`; None for 0.
    """

    q: Any
    scale: Any
    zero: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        shape: tuple[int, ...] = self.q.shape
        return shape

    @property
    def size(self) -> int:
        """Number of elements of the weight."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The compute dtype."""
        dtype: np.dtype = self.scale.dtype
        return dtype


Weight = jax.Array | QTensor


def quantize(weight: Any, bits: Literal[4, 8], blocks: Sequence[int], dtype: Any) -> QTensor:
    """Rounds a weight to integers.

    Eight bits are symmetric around zero. Four bits cover the range of a block from its smallest to
    its largest value, so the Q4_1 blocks of a GGUF file are kept exactly.

    Scales and zero points are rounded to bfloat16 precision whatever their dtype, before the
    integers are computed: a checkpoint gives the same numbers in float32 and in bfloat16.

    Args:
        weight: any floating dtype; a NumPy array, which stays on the host, or a JAX array.
        bits: bits per integer.
        blocks: the number of blocks along every axis.
        dtype: the dtype of scales and zero points.
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
    """Quantises a weight with the bits and blocks of `like`, an (abstract) quantised weight. The
    weight may be one layer of `like`, and some of its outputs."""
    bits: Literal[4, 8] = 8 if like.q.dtype == jnp.int8 else 4
    sizes, counts = like.shape[-weight.ndim :], like.scale.shape[-weight.ndim :]
    axes = zip(weight.shape, sizes, counts, strict=True)
    blocks = [length if count == size else count for length, size, count in axes]
    return quantize(weight, bits, blocks, like.dtype)


def _representable(scale: Any) -> Any:
    return _bfloat16(scale.clip(_TINY))


def _bfloat16(x: Any) -> Any:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def dequantize(weight: QTensor) -> jax.Array:
    """Restores the weight, in the dtype of its scales."""
    blocks = weight.scale.shape
    parts = _split(weight.q.astype(weight.dtype), blocks) * _split(weight.scale, blocks)
    if weight.zero is not None:
        parts = parts + _split(weight.zero, blocks)
    return parts.reshape(weight.shape)


def _split(array: Any, blocks: Sequence[int]) -> Any:
    """Splits every axis in two: blocks, and elements within a block."""
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
    """Multiplies x [..., *in] and a weight [*in, *out]: [..., *out].

    Args:
        x: an array in the weight's dtype.
        weight: plain or quantised.
        inputs: the number of input axes of the weight.
        transposed: whether the weight is a matrix [out, in].
        dtype: dtype of the result; None for that of `x`.
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
            # Flattened to a matrix: with separate N and H axes, XLA would transpose the weight at
            # every use.
            weight = weight.reshape(-1, math.prod(out))
        x = x.reshape(*x.shape[: x.ndim - inputs], -1)
        y = jnp.einsum(spec, x, weight, preferred_element_type=dtype)
        y = y if after is None else y * after
        return y.reshape(*y.shape[:-1], *out)

    if isinstance(weight, QTensor) or len(weight.shape) > 2:
        # The backward pass flattens and dequantises the weight again; otherwise a scan would keep
        # a copy for every layer.
        return recomputed(product)(x, weight)
    return product(x, weight)


def take(table: Weight, ids: jax.Array) -> jax.Array:
    """Looks up rows of a table [V, D]: x_BTD for ids_BT, in the dtype of the table."""
    rows: Weight = jax.tree.map(lambda leaf: look_up(leaf, ids), table)
    return dequantize(rows) if isinstance(rows, QTensor) else rows
