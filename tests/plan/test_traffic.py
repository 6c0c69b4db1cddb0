"""Memory traffic: bytes that kernels read from and write to device memory."""

import pytest

from prefix_jax.plan.hlo import parse
from prefix_jax.plan.kernels import kernel
from prefix_jax.plan.products import cost
from prefix_jax.plan.traffic import bytes_accessed
from prefix_jax.plan.walk import visits

ROW = 128 * 4


def traffic(*lines: str, before: str = "") -> int:
    body = "".join(f"  {line}\n" for line in lines)
    module = parse(f"{before}ENTRY %main (a: f32[64,128]) -> f32[64,128] {{\n{body}}}\n")
    return sum(bytes_accessed(module, visit) * visit.count for visit in visits(module, cost))


A = "%a = f32[64,128]{1,0} parameter(0)"


def test_kernel_reads_operands_and_writes_result() -> None:
    assert traffic(A, "ROOT %r = f32[64,128]{1,0} tanh(%a)") == 2 * 64 * ROW


def test_arrays_in_on_chip_memory_are_free() -> None:
    lines = (
        A,
        "%b = f32[64,128]{1,0:T(8,128)S(1)} tanh(%a)",
        "ROOT %r = f32[64,128]{1,0:T(8,128)} negate(%b)",
    )
    assert traffic(*lines) == 2 * 64 * ROW


def test_instructions_that_pass_arrays_on_are_free() -> None:
    lines = (A, "%b = f32[128,64]{1,0} bitcast(%a)", "ROOT %t = (f32[128,64]{1,0}) tuple(%b)")
    assert traffic(*lines) == 0


def test_copy_to_the_chip_reads_once() -> None:
    lines = (
        A,
        "%s = (f32[64,128]{1,0:S(1)}, f32[64,128]{1,0}, u32[]{:S(2)}) copy-start(%a)",
        "ROOT %r = f32[64,128]{1,0:S(1)} copy-done(%s)",
    )
    assert traffic(*lines) == 64 * ROW


def test_transfers_between_slices_read_or_write_once() -> None:
    lines = (
        A,
        "%t = token[] after-all()",
        "%s = (f32[64,128]{1,0}, u32[]{:S(2)}, token[]) send(%a, %t), channel_id=1",
        "%d = token[] send-done(%s), channel_id=1",
        "%r = (f32[64,128]{1,0}, u32[]{:S(2)}, token[]) recv(%t), channel_id=2",
        "ROOT %e = (f32[64,128]{1,0}, token[]) recv-done(%r), channel_id=2",
    )
    assert traffic(*lines) == 2 * 64 * ROW


SLICED = """%inside (p: f32[64,128], i: s32[]) -> f32[1,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  ROOT %r = f32[1,128]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,128}
}

"""
UPDATED = """%inside (p: f32[64,128], q: f32[1,128], i: s32[]) -> f32[64,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %q = f32[1,128]{1,0} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  ROOT %r = f32[64,128]{1,0} dynamic-update-slice(%p, %q, %i, %i)
}

"""
NESTED = (
    SLICED.replace("%inside", "%within")
    + """%inside (p: f32[64,128], i: s32[]) -> f32[1,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  ROOT %f = f32[1,128]{1,0} fusion(%p, %i), kind=kLoop, calls=%within
}

"""
)

# On newer chips: the stack is retiled, but never materialised as a whole.
RETILED = """%copied (p: f32[64,128]) -> f32[64,128] {
  %p = f32[64,128]{1,0:T(16,128)} parameter(0)
  ROOT %c = f32[64,128]{1,0:T(8,128)} copy(%p)
}

"""
RETILE = (
    "fusion(%whole), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%copied\n"
    "  %p = f32[64,128]{1,0:T(8,128)} bitcast(%v)"
)


def retiled(inside: str) -> str:
    plain = "%p = f32[64,128]{1,0} parameter(0)"
    assert plain in inside
    whole = "%whole = f32[64,128]{1,0:T(16,128)} parameter(0)\n"
    return RETILED + inside.replace(plain, f"{whole}  %v = f32[64,128]{{1,0:T(8,128)}} {RETILE}")


@pytest.mark.parametrize("inside", [SLICED, NESTED, retiled(SLICED)])
def test_fusion_counts_only_the_slice_it_reads(inside: str) -> None:
    lines = (
        A,
        "%i = s32[]{:S(6)} parameter(1)",
        "ROOT %f = f32[1,128]{1,0} fusion(%a, %i), kind=kLoop, calls=%inside",
    )
    assert traffic(*lines, before=inside) == 2 * ROW


@pytest.mark.parametrize("inside", [UPDATED, retiled(UPDATED)])
def test_fusion_counts_only_the_update_it_writes(inside: str) -> None:
    lines = (
        A,
        "%b = f32[1,128]{1,0} parameter(1)",
        "%i = s32[]{:S(6)} parameter(2)",
        "ROOT %f = f32[64,128]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%inside",
    )
    assert traffic(*lines, before=inside) == 2 * ROW


@pytest.mark.parametrize(("name", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_splash_attention_counts_visible_tiles(name: str, products: int) -> None:
    text = f"""ENTRY %main () -> bf16[6,4,2048,64] {{
  %m = s8[1,4,4]{{2,1,0}} parameter(0)
  %q = bf16[6,4,2048,64]{{3,2,1,0}} parameter(1)
  %k = bf16[6,2048,64]{{2,1,0}} parameter(2)
  ROOT %splash_mqa_{name}_segmented.1 = bf16[6,4,2048,64]{{3,2,1,0}} custom-call(%m, %m, %q, %k, \
%k), custom_call_target="tpu_custom_call"
}}
"""
    (last,) = [v for v in visits(parse(text), cost) if v.instruction.root]
    dense = 2 * 6 * 4 * 2048 * 2048 * 64
    both, causal = (kernel(last.computation, last.instruction, causal) for causal in (False, True))
    assert both is not None
    assert causal is not None
    assert both.flops == products * dense
    assert causal.flops == products * dense * 10 // 16
    assert 0 < causal.again < both.again


@pytest.mark.parametrize(("name", "grid"), [("fwd", "4,3"), ("dq", "4,3"), ("dkv", "3,16")])
def test_splash_attention_counts_tiles_of_a_window(name: str, grid: str) -> None:
    """4 x 16 tiles, on one of 4 devices that share a row."""
    text = f"""ENTRY %main () -> bf16[6,4,2048,64] {{
  %m = s8[1,{grid}]{{2,1,0}} parameter(0)
  %q = bf16[6,4,2048,64]{{3,2,1,0}} parameter(1)
  %k = bf16[6,8192,64]{{2,1,0}} parameter(2)
  ROOT %splash_mqa_{name}_segmented.1 = bf16[6,4,2048,64]{{3,2,1,0}} custom-call(%m, %m, %q, %k, \
%k), custom_call_target="tpu_custom_call"
}}
"""
    (last,) = [v for v in visits(parse(text), cost) if v.instruction.root]
    both, narrow = (kernel(last.computation, last.instruction, causal) for causal in (False, True))
    assert both is not None
    assert narrow is not None
    assert narrow.flops / both.flops == (3 / 4 if name == "dkv" else 3 / 16)
    assert narrow.again < both.again
