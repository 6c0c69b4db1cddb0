"""What Pallas kernels compute and read, from the shapes of their arguments.

A kernel's own program stands in the text of a compiled one as bytes. Those of splash attention are
known by their names, and count as their source has it: forwards the products of logits and of the
mix; for the queries' gradient the logits again, the gradients of weights and of queries; for that
of keys and values the logits again, the gradients of weights, of keys and of values.
"""

from __future__ import annotations

import dataclasses
import re

from prefix_jax.plan.hlo import Array, Computation, Instruction

_SPLASH = re.compile(r"splash_m[qh]a_(fwd|dq|dkv)")
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one run of a kernel costs.

    Attributes:
        flops: of its products.
        again: bytes that it reads more often than once, beyond the first time.
    """

    flops: int
    again: int


def kernel(computation: Computation, instruction: Instruction, causal: bool) -> Kernel | None:
    """The cost of a known kernel; None of anything else.

    Args:
        computation, instruction: of the program.
        causal: whether its queries see no later keys: tiles that nobody sees are left out. Devices
            that share the queries of a row have equally many of them. Under a window, the grid has
            no more tiles along the axis that is summed over than some query or key needs.
    """
    named = _SPLASH.match(instruction.name)
    if instruction.opcode != "custom-call" or named is None:
        return None
    operands = [computation[name].results[0] for name in instruction.operands]
    grid = operands[0].dims
    # q_…GTH, k_…SH, …; before them numbers of tiles, [1, rows, columns].
    queries, keys = [array for array in operands if array.dtype in ("bf16", "f16", "f32")][:2]
    T, H = queries.dims[-2:]
    S = keys.dims[-2]
    rows, columns = grid[-2:] if len(grid) > 1 else (1, 1)
    share = 1.0
    if causal and S % T == 0:
        # Tiles are square: as many to a query as to a key.
        along, across = (rows * S, columns * T) if named[1] == "dkv" else (columns * T, rows * S)
        share = (columns + 1) / (2 * columns) if along == across else min(along / across, 1.0)
    heads = queries.elements // (T * H)
    each = 2 * heads * T * S * H
    inner, outer_tiles = (queries, columns) if named[1] == "dkv" else (keys, rows)
    repeated = _bytes(inner, heads if inner is keys else 1)
    again = 2 * max(round(repeated * outer_tiles * share) - inner.nbytes, 0)
    return Kernel(round(_PRODUCTS[named[1]] * each * share), again)


def _bytes(array: Array, heads: int) -> int:
    """Bytes of the keys, read by every query head; or of the queries."""
    if heads == 1:
        return array.nbytes
    S, H = array.dims[-2:]
    return heads * S * H * (array.nbytes // array.elements)
