"""Counts the matrix products of a compiled program, nearly all of a transformer's computation.

`compiled.cost_analysis()` counts a loop body only once, and nothing inside a library call. This
module walks the program from its entry and counts every iteration of a loop.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from prefix_jax.plan.hlo import Array, Computation, Instruction, Module
from prefix_jax.plan.walk import visits


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product.

    Attributes:
        op_name: its origin in the traced Python program; empty if the compiler added it.
        out: the result of one run.
        inputs: the two operands.
        count: the number of times that the program computes it.
        flops: operations of all runs; a multiply-add counts as two.
    """

    op_name: str
    out: Array
    inputs: tuple[Array, Array]
    count: int
    flops: int


# Library calls that are products, in oneDNN and cuBLAS.
_LIBRARY = re.compile(r"gemm|matmul|\bdot\b", re.IGNORECASE)


def products(module: Module) -> list[Product]:
    """Finds all matrix products of a program, costliest first.

    Products inside fusions and library calls are included. Those in a loop count at every
    iteration, those in a conditional only in its costliest branch. Convolutions are included,
    because the TPU compiler converts `dot` to them.

    Raises:
        ValueError: a loop contains products, but its trip count is unknown.
    """
    counted = []
    for visit in visits(module, cost):
        if each := cost(visit.computation, visit.instruction):
            inputs = _inputs(visit.computation, visit.instruction)
            name, out = visit.instruction.op_name, visit.instruction.results[0]
            counted.append(Product(name, out, inputs, visit.times, each * visit.times))
    return sorted(counted, key=lambda product: -product.flops)


def flops(module: Module) -> int:
    """Floating-point operations of all matrix products."""
    return sum(product.flops for product in products(module))


def opaque(module: Module) -> tuple[str, ...]:
    """Targets of custom calls that `products` cannot see into, such as Pallas kernels."""
    targets = {
        instruction.word("custom_call_target") or ""
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "custom-call"
    }
    return tuple(sorted(target for target in targets if not _LIBRARY.search(target)))


def _inputs(computation: Computation, instruction: Instruction) -> tuple[Array, Array]:
    left, right = (computation[operand].results[0] for operand in instruction.operands[:2])
    return left, right


def cost(computation: Computation, instruction: Instruction) -> int:
    """Operations of one run of an instruction; 0 if it is not a product."""
    if instruction.opcode == "dot":
        left, _ = _inputs(computation, instruction)
        contracted = [int(axis) for axis in instruction.listed("lhs_contracting_dims")]
        size = math.prod(left.dims[axis] for axis in contracted)
        return 2 * instruction.results[0].elements * size
    if instruction.opcode == "convolution":
        return _convolution_cost(instruction, *_inputs(computation, instruction))
    target = instruction.word("custom_call_target")
    if instruction.opcode == "custom-call" and target and _LIBRARY.search(target):
        # [b, m, k] x [b, k, n] or [b, m, k] x [k, n], either side transposed or not.
        left, right = _inputs(computation, instruction)
        out = instruction.results[0]
        batch = math.prod(out.dims[:-2]) if len(right.dims) > 2 else 1
        contracted_size = math.isqrt(left.elements * right.elements // (out.elements * batch))
        return 2 * out.elements * contracted_size
    return 0


def _convolution_cost(instruction: Instruction, left: Array, right: Array) -> int:
    """Operations of a convolution, without taps on padding or between dilated elements.

    The TPU compiler turns batch and head axes of a product into spatial axes, on which only a
    single tap hits.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if not labels:
        raise ValueError(f"the convolution {instruction.name} has no dim_labels")
    left_labels, right_labels, out_labels = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}

    def numbers(key: str, default: int) -> list[int]:
        axes = len(left_labels) - 2
        # Padding is "low_high"; low determines the positions of the taps.
        each = fields[key].split("x") if key in fields else [str(default)] * axes
        return [int(value.split("_")[0]) for value in each]

    groups = int(instruction.word("feature_group_count") or 1)
    groups *= int(instruction.word("batch_group_count") or 1)
    products = left.dims[left_labels.index("b")] * left.dims[left_labels.index("f")]
    products = products * right.dims[right_labels.index("o")] // groups
    spatial = zip(
        numbers("size", 1),
        numbers("stride", 1),
        numbers("pad", 0),
        numbers("lhs_dilate", 1),
        numbers("rhs_dilate", 1),
        strict=True,
    )
    for axis, (size, stride, low, left_step, right_step) in enumerate(spatial):
        out_size = instruction.results[0].dims[out_labels.index(str(axis))]
        left_size = left.dims[left_labels.index(str(axis))]
        at = np.arange(out_size)[:, None] * stride + np.arange(size) * right_step - low
        hit = (at >= 0) & (at % left_step == 0) & (at // left_step < left_size)
        products *= int(hit.sum())
    return 2 * products
