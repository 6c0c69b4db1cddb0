"""Operations and memory traffic of Pallas kernels, from the shapes of their arguments.

The text of a compiled program contains a kernel only as bytes. Splash attention kernels are
recognised by name, and their products counted according to their source: forward, the logits and
the weighted sum; for the gradient of the queries, the logits again and the gradients of weights and
queries; for the gradient of keys and values, the logits again and the gradients of weights, keys
and values.
"""

from __future__ import annotations

import dataclasses
import re

from prefix_jax.plan.hlo import Array, Computation, Instruction

_SPLASH = re.compile(r"splash_m[qh]a_(fwd|dq|dkv)")
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Cost of one run of a kernel.

    Attributes:
        flops: operations of its products.
        again: bytes read repeatedly, not counting the first read.
    """

    flops: int
    again: int


def kernel(computation: Computation, instruction: Instruction, causal: bool) -> Kernel | None:
    """The cost of a known kernel; None for any other instruction.

    Args:
        computation, instruction: the instruction and the computation that contains it.
        causal: whether queries see no later keys, so that fully masked tiles are skipped. Devices
            that share the queries of a row have equally many such tiles. With a window, the grid
            has only as many tiles along the reduced axis as some query or key needs.
    """
    named = _SPLASH.match(instruction.name)
    if instruction.opcode != "custom-call" or named is None:
        return None
    operands = [computation[name].results[0] for name in instruction.operands]
    grid = operands[0].dims
    # q_…GTH, k_…SH, …, preceded by tile indices [1, rows, columns].
    queries, keys = [array for array in operands if array.dtype in ("bf16", "f16", "f32")][:2]
    T, H = queries.dims[-2:]
    S = keys.dims[-2]
    rows, columns = grid[-2:] if len(grid) > 1 else (1, 1)
    share = 1.0
    if causal and S % T == 0:
        # Tiles are square, so queries and keys have equally many.
        along, across = (rows * S, columns * T) if named[1] == "dkv" else (columns * T, rows * S)
        share = (columns + 1) / (2 * columns) if along == across else min(along / across, 1.0)
    heads = queries.elements // (T * H)
    each = 2 * heads * T * S * H
    inner, outer_tiles = (queries, columns) if named[1] == "dkv" else (keys, rows)
    repeated = _bytes(inner, heads if inner is keys else 1)
    again = 2 * max(round(repeated * outer_tiles * share) - inner.nbytes, 0)
    return Kernel(round(_PRODUCTS[named[1]] * each * share), again)


def _bytes(array: Array, heads: int) -> int:
    """Bytes of the keys, read once per query head; or of the queries."""
    if heads == 1:
        return array.nbytes
    S, H = array.dims[-2:]
    return heads * S * H * (array.nbytes // array.elements)
