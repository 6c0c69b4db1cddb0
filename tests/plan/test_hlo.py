"""Parsing of HLO text from any compiler."""

import pytest

from prefix_jax.plan.hlo import Array, parse, temporaries

# Abridged output of the CPU compiler.
CPU = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4,8]{1,0})->f32[4,4]{1,0}}

%fused_computation (param_0: f32[4,8], param_1: f32[8,4]) -> f32[4,4] {
  %param_0 = f32[4,8]{1,0} parameter(0)
  %param_1 = f32[8,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,4]{1,0} dot(%param_0, %param_1), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}, metadata={op_name="jit(f)/x (y)/dot_general" stack_frame_id=1}
}

ENTRY %main.1 (Arg_0.1: f32[4,8]) -> (f32[4,4], s32[]) {
  %Arg_0.1 = f32[4,8]{1,0} parameter(0), metadata={op_name="x[\\'w\\']"}
  %constant.2 = s32[] constant(-3)
  %table = f32[2,2]{1,0} constant({ { 1, 2 }, { 3, 4 } })
  %copy.3 = f32[8,4]{1,0} copy(%Arg_0.1)
  %ynn_fusion = f32[4,4]{1,0} fusion(%Arg_0.1, /*index=1*/%copy.3), kind=kCustom, \
calls=%fused_computation, backend_config={"fusion_config":{"kind":"__ynn_fusion"}}
  ROOT %tuple.4 = (f32[4,4]{1,0}, s32[]) tuple(%ynn_fusion, %constant.2)
}
"""


def test_finds_the_entry_computation() -> None:
    module = parse(CPU)
    assert module.entry == "main.1"
    assert set(module.computations) == {"fused_computation", "main.1"}
    assert list(module.computations["main.1"])[-1] == "tuple.4"


def test_parses_arrays_operands_and_attributes() -> None:
    module = parse(CPU)
    dot = module.computations["fused_computation"]["dot.1"]
    assert (dot.opcode, dot.operands, dot.root) == ("dot", ("param_0", "param_1"), True)
    assert dot.results == (Array("f32", (4, 4)),)
    assert dot.listed("lhs_contracting_dims") == ("1",)
    assert dot.listed("lhs_batch_dims") == ()
    assert dot.op_name == "jit(f)/x (y)/dot_general"
    main = module.computations["main.1"]
    assert main["ynn_fusion"].operands == ("Arg_0.1", "copy.3")
    assert main["ynn_fusion"].word("calls") == "fused_computation"
    assert main["ynn_fusion"].word("custom_call_target") is None
    assert main["tuple.4"].results == (Array("f32", (4, 4)), Array("s32", ()))
    assert main["constant.2"].operands == ("-3",)
    assert not main["copy.3"].root


@pytest.mark.parametrize(
    ("line", "operands", "result"),
    [
        ("  %a.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} add(%b, %c)", ("b", "c"), "bf16[8,128]"),
        ("  a = f32[2]{0} add(f32[2]{0} b, f32[2]{0} %c), x={}", ("b", "c"), "f32[2]"),
        ("  ROOT %a = pred[] compare(%b.clone..sunk, %c), direction=LT", ("b.clone..sunk", "c"),
         "pred[]"),
        ("  %a = f8e4m3fn[3,2]{1,0} convert(%b)", ("b",), "f8e4m3fn[3,2]"),
    ],
)  # fmt: skip
def test_parses_layouts_tiles_and_typed_operands(
    line: str, operands: tuple[str, ...], result: str
) -> None:
    module = parse(f"ENTRY %main (b: f32[2]) -> f32[2] {{\n{line}\n}}\n")
    (instruction,) = module.computations["main"].values()
    assert instruction.operands == operands
    assert [str(array) for array in instruction.results] == [result]


def test_array_sizes() -> None:
    assert Array("bf16", (3, 5)).nbytes == 30
    assert Array("f32", ()).nbytes == 4
    assert Array("pred", (7,)).nbytes == 7
    assert Array("s4", (8,)).nbytes == 4
    assert Array("f8e4m3fn", (8,)).nbytes == 8


def test_temporaries_exclude_arrays_inside_fusions() -> None:
    assert [str(array) for array in temporaries(parse(CPU))] == ["f32[8,4]", "f32[4,4]"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("module @jit_f { func.func }", "no ENTRY"),
        ("", "no ENTRY"),
        ("ENTRY %main () -> f32[] {\n  what is this\n}\n", "what is this"),
        ("ENTRY %main () -> f32[] {\n  %a = f32[] add(%b\n}\n", "unbalanced"),
    ],
)
def test_rejects_text_that_is_not_hlo(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)
