"""Matrix products of a compiled program are counted at every run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.plan.hlo import parse
from prefix_jax.plan.products import flops, opaque, products

pytestmark = pytest.mark.usefixtures("full_compilation")


def compiled_flops(function: Callable[..., Any], *shapes: tuple[int, ...]) -> int:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return flops(parse(jax.jit(function).lower(*arrays).compile().as_text()))


def scanned(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_product_counts_two_operations_per_multiply_add() -> None:
    assert compiled_flops(jnp.matmul, (24, 40), (40, 56)) == 2 * 24 * 40 * 56


def test_counts_batch_axes_and_several_contracted_axes() -> None:
    def products(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.einsum("btnh,bsnh->bnts", q, k), jnp.einsum("btnh,bsnh->ts", q, k)

    flops = 2 * 3 * 17 * 19 * 5 * 16
    assert compiled_flops(products, (3, 17, 5, 16), (3, 19, 5, 16)) == 2 * flops


def test_elementwise_operations_are_not_counted() -> None:
    assert compiled_flops(lambda x: jnp.tanh(x).sum(axis=0), (24, 40)) == 0


def test_scan_counts_every_iteration() -> None:
    assert compiled_flops(scanned, (24, 40), (7, 40, 40)) == 7 * 2 * 24 * 40 * 40


def test_trip_counts_of_nested_scans_multiply() -> None:
    def outer(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (scanned(x, w), None), x, weights)[0]

    assert compiled_flops(outer, (24, 40), (5, 7, 40, 40)) == 35 * 2 * 24 * 40 * 40


def test_gradient_of_only_the_activations_doubles_the_forward_cost() -> None:
    def loss(x: jax.Array, weights: jax.Array) -> jax.Array:
        return scanned(x, weights).sum()

    forward = 7 * 2 * 24 * 40 * 40
    shapes = (24, 40), (7, 40, 40)
    assert compiled_flops(jax.grad(loss), *shapes) == 2 * forward
    assert compiled_flops(jax.grad(loss, argnums=(0, 1)), *shapes) == 3 * forward


def test_counts_rematerialisation() -> None:
    @jax.checkpoint
    def block(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    def loss(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (block(x, w), None), x, weights)[0].sum()

    # Per block: 2 products forward, 2 for the gradient of the activations, and 2 recomputed, as the
    # gradient of the outer tanh needs its output.
    assert compiled_flops(jax.grad(loss), (24, 40), (7, 40, 40)) == 6 * 7 * 2 * 24 * 40 * 40


def test_conditional_counts_its_costliest_branch() -> None:
    def choose(x: jax.Array, w: jax.Array, index: jax.Array) -> jax.Array:
        branches = [lambda: x, lambda: x @ w, lambda: jnp.sin(x @ w) @ w]
        return jax.lax.switch(jnp.int32(index), branches)

    assert compiled_flops(choose, (24, 40), (40, 40), ()) == 2 * 2 * 24 * 40 * 40


def test_product_records_shapes_count_and_origin() -> None:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((24, 40), (7, 40, 40))]
    module = parse(jax.jit(scanned).lower(*arrays).compile().as_text())
    (product,) = products(module)
    assert product.count == 7
    assert product.out.dims == (24, 40)
    assert sorted(array.elements for array in product.inputs) == [24 * 40, 40 * 40]
    assert "dot_general" in product.op_name


def entry(*lines: str, before: str = "") -> str:
    body = "".join(f"  {line}\n" for line in lines)
    return f"{before}ENTRY %main (a: f32[4,8]) -> f32[4,8] {{\n{body}}}\n"


def test_library_call_is_counted_from_its_argument_shapes() -> None:
    text = entry(
        "%a = f32[3,4,8]{2,1,0} parameter(0)",
        "%b = f32[3,8,6]{2,1,0} parameter(1)",
        '%c = f32[3,4,6]{2,1,0} custom-call(%a, %b), custom_call_target="__onednn$matmul"',
        "%d = f32[6,5]{1,0} parameter(2)",
        'ROOT %e = (f32[3,4,5]{2,1,0}, s8[64]{0}) custom-call(%c, %d), '
        'custom_call_target="__cublas$gemm"',
    )  # fmt: skip
    assert flops(parse(text)) == 2 * 3 * 4 * 6 * 8 + 2 * 3 * 4 * 5 * 6


def test_opaque_custom_calls_are_listed() -> None:
    text = entry(
        "%a = f32[4,8]{1,0} parameter(0)",
        '%b = f32[4,8]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"',
        'ROOT %c = f32[4,4]{1,0} custom-call(%a, %b), custom_call_target="__onednn$matmul"',
    )
    assert opaque(parse(text)) == ("tpu_custom_call",)


LOOP = """\
%body (t: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {{
  %t = (s32[]{{:T(128)}}, f32[4,8]{{1,0:T(8,128)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%t), index=0
  %x = f32[4,8]{{1,0:T(8,128)}} get-tuple-element(%t), index=1
  %one = s32[]{{:T(128)}} constant({step})
  %next = s32[]{{:T(128)}} add(%i, %one)
  %w = f32[8,8]{{1,0:T(8,128)}} constant({{...}})
  %y = f32[4,8]{{1,0:T(8,128)}} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %r = (s32[]{{:T(128)}}, f32[4,8]{{1,0:T(8,128)}}) tuple(%next, %y)
}}

%condition (t: (s32[], f32[4,8])) -> pred[] {{
  %t = (s32[]{{:T(128)}}, f32[4,8]{{1,0:T(8,128)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%t), index=0
  %limit = s32[]{{:T(128)}} constant(30)
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %limit), direction=LT
}}

"""
WHILE = (
    "%zero = s32[]{:T(128)} constant(0)",
    "%start = s32[]{:T(128)} copy(%zero)",
    "%x = f32[4,8]{1,0:T(8,128)} parameter(0)",
    "%t = (s32[], f32[4,8]) tuple(%start, %x)",
    "%loop = (s32[], f32[4,8]) while(%t), condition=%condition, body=%body",
    "ROOT %out = f32[4,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1",
)


def test_tpu_loop_is_counted_from_its_condition() -> None:
    text = entry(*WHILE, before=LOOP.format(step=1))
    assert flops(parse(text)) == 30 * 2 * 4 * 8 * 8


def test_loop_with_step_two_runs_half_as_often() -> None:
    text = entry(*WHILE, before=LOOP.format(step=2))
    assert flops(parse(text)) == 15 * 2 * 4 * 8 * 8


def test_rejects_a_loop_of_unknown_trip_count() -> None:
    text = entry(*WHILE, before=LOOP.format(step=1).replace("LT", "NE"))
    with pytest.raises(ValueError, match="unknown trip count of loop loop"):
        flops(parse(text))


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "expected"),
    [
        # x_TD w_DNH from the TPU compiler: heads are taps, all but one on padding.
        ("512,576,1", "576,9,64", "512,9,64",
         "window={size=9 pad=8_8 rhs_reversal=1}, dim_labels=bf0_i0o->b0f", 2 * 512 * 576 * 576),
        # y_TNH w_NHD: heads are contracted.
        ("512,9,64", "9,64,576", "512,576,1",
         "window={size=9}, dim_labels=b0f_0io->bf0", 2 * 512 * 576 * 576),
        # Logits per head: batch axes are dilated.
        ("3,3,512,64", "512,3,64,1", "3,3,512,512",
         "window={size=3x1 stride=2x1 lhs_dilate=3x1}, dim_labels=01bf_o0i1->01bf",
         2 * 9 * 512 * 512 * 64),
        ("2,10,6", "3,6,5", "2,10,5", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
         2 * 2 * (10 * 3 - 2) * 6 * 5),
        ("2,10,6", "3,1,6", "2,10,6",
         "window={size=3 pad=2_0}, dim_labels=b0f_0io->b0f, feature_group_count=6",
         2 * 2 * (10 * 3 - 3) * 6),
    ],
)  # fmt: skip
def test_counts_convolutions(
    left: str, right: str, out: str, attributes: str, expected: int
) -> None:
    text = entry(
        f"%a = f32[{left}] parameter(0)",
        f"%b = f32[{right}] parameter(1)",
        f"ROOT %c = f32[{out}] convolution(%a, %b), {attributes}",
    )
    assert flops(parse(text)) == expected


def test_compiled_convolution_agrees_with_its_definition() -> None:
    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    taps = int(np.convolve(np.ones(10), np.ones(3), "same").sum())
    assert compiled_flops(convolve, (2, 10, 6), (3, 6, 5)) == 2 * 2 * taps * 6 * 5
