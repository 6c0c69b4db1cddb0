"""Plans agree with the TPU compiler."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import pytest
from plans import SINGLE, config_of, formula

from prefix_jax.errors import ConfigError, MeshError
from prefix_jax.plan import report
from prefix_jax.plan.abstract import AbstractRun, BatchShape
from prefix_jax.plan.plan import Memory, Plan, plan
from prefix_jax.plan.plan import _memory as memory_of
from prefix_jax.plan.topology import GIB, Topology


@pytest.fixture(scope="module")
def trained(folder: Path) -> Plan:
    return plan(config_of(folder, "mesh.tensor=2"), "v5e:2x2")


def test_compiles_a_step_without_weights_or_data(trained: Plan) -> None:
    assert trained.fits
    assert trained.over == 0
    assert trained.mesh == {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 2}
    assert trained.batch == BatchShape(8, 16, 16)
    memory, roofline = trained.memory, trained.roofline
    assert memory is not None
    assert roofline is not None
    assert trained.floor is not None
    assert memory.weights <= memory.arguments < memory.total == trained.needs < memory.limit
    # Each matrix is split over two devices.
    count = 2 * 128 * 32 + 2 * (32 * 16 * 4 + 3 * 32 * 64)
    assert count < memory.weights < 2 * count
    # Nothing is computed twice; the compiler may omit unused results.
    assert 0.8 < roofline.flops * 4 / trained.floor < 1.2
    assert roofline.bytes_accessed > memory.weights
    assert roofline.exchanges["all-reduce"].count >= 2 * 2  # per layer, forward and backward
    assert roofline.seconds >= max(roofline.compute, roofline.memory)
    assert roofline.sent == sum(exchange.sent for exchange in roofline.exchanges.values())
    rate = trained.tokens_per_second
    assert rate == pytest.approx(8 * 16 / roofline.seconds)


def test_memory_is_the_peak_not_the_sum_of_temporaries() -> None:
    # Compiler statistics for 561 rows of a small Llama, in MiB. It rejected 562 rows: 15.77 GiB.
    stats = types.SimpleNamespace(
        argument_size_in_bytes=17,
        temp_size_in_bytes=21_460,
        peak_memory_in_bytes=16_093,
        generated_code_size_in_bytes=18,
        output_size_in_bytes=0,
        alias_size_in_bytes=0,
    )
    compiled: Any = types.SimpleNamespace(memory_analysis=lambda: stats)
    memory = memory_of(compiled, {}, 16_128)
    assert memory == Memory(0, 17, 16_093 + 18 - 17, 16_093 + 18, 16_128)
    assert memory.total <= memory.limit


def test_decoding_generates_one_token_per_row(folder: Path) -> None:
    planned = plan(config_of(folder, "data.batch_size=4"), "v5e:1x1", tokens=32, job="decode")
    assert planned.memory is not None
    assert planned.roofline is not None
    cache = 2 * 2 * 4 * 2 * 32 * 8 * 2
    assert planned.memory.arguments >= planned.memory.weights + cache
    assert planned.tokens_per_second == pytest.approx(4 / planned.roofline.seconds)


def test_plan_of_a_step_that_does_not_fit() -> None:
    config = config_of("preset:llama-3-70b", "data.batch_size=1")
    planned = plan(config, "v5e:1x1", tokens=256)
    assert not planned.fits
    assert planned.over == planned.needs - planned.limit > 50 * GIB
    assert planned.memory is planned.roofline is planned.tokens_per_second is None


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        ((), {"tokens": 0}, "--tokens 0: must be at least 2"),
        ((), {"tokens": 1}, "--tokens 1: must be at least 2"),
        ((), {"tokens": 3000}, "and at most 2044, the model's positions"),
        ((), {"targets": 17}, "--targets 17: must be at least 1 and at most 16"),
        ((), {"targets": 0}, "--targets 0: must be at least 1 and at most 16"),
        ((), {"targets": 5, "job": "decode"}, "--targets 5: decoding has no targets"),
        (
            (
                "task.name=classify",
                "data.target=null",
                "data.input={a}",
                "model.path=preset:t5-large",
            ),
            {},
            "t5 is an encoder-decoder, but a head needs an encoder or a decoder",
        ),
        (("task.name=classify", "data.target=null", "data.input={a}"), {"job": "decode"}, "labels"),
    ],
)
def test_rejects_settings_that_do_not_fit_the_model(
    folder: Path, overrides: tuple[str, ...], arguments: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(config_of(folder, *overrides), "v5e:1x1", **arguments)


def test_rejects_rows_that_do_not_divide_over_the_mesh(folder: Path) -> None:
    with pytest.raises(MeshError, match=r"data\.batch_size 6 does not divide over 4"):
        plan(config_of(folder, "data.batch_size=6"), "v5e:2x2")


def test_micro_batches_apply_only_to_training(folder: Path) -> None:
    config = config_of(folder, "optim.grad_accum_steps=4")
    assert AbstractRun.of(config).batch_shape() == BatchShape(8, 16, 16, micro=4)
    assert AbstractRun.of(config, "decode").batch_shape() == BatchShape(8, 16, 16, micro=1)


def test_targets_are_limited_by_decoder_positions(tmp_path: Path) -> None:
    bart = {"d_model": 32, "vocab_size": 64, "max_position_embeddings": 40, "eos_token_id": 2}
    for stack in ("encoder", "decoder"):
        bart |= {f"{stack}_{key}": size for key, size in
                 (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bart", **bart}))
    config = config_of(tmp_path, "method.sites=[decoder]", "data.max_length=40")
    run = AbstractRun.of(config)
    assert run.batch_shape() == BatchShape(8, tokens=36, targets=36, source=40)
    with pytest.raises(ConfigError, match="--targets 37: must be at least 1 and at most 36"):
        run.batch_shape(targets=37)


def test_figures_of_a_small_step_are_not_rounded_to_zero(folder: Path) -> None:
    compile_step, _ = formula(lambda shape, _: 1.0, lambda _: 0.000661)
    topology, run = Topology.parse("v5e:1x1"), AbstractRun.of(config_of(folder))
    compiled = compile_step(run, BatchShape(8, 16, 16), topology, topology.mesh(SINGLE))
    assert compiled.roofline is not None
    compiled = dataclasses.replace(
        compiled, roofline=dataclasses.replace(compiled.roofline, flops=2_100_000)
    )
    assert "at least 0.661 ms" in report.line(compiled)
    lines = [figures for _, _, figures in report._lines(compiled)]
    assert any(figures.startswith("0.002 GFLOP per device") for figures in lines)


def test_quantised_weights_are_counted_in_bits(folder: Path) -> None:
    from prefix_jax.plan.plan import bytes_on_one

    run = AbstractRun.of(config_of("preset:llama-3-8b"))
    mesh = Topology.parse("v5e:1x1").mesh(SINGLE)
    sizes = [
        bytes_on_one(run.with_model(quantize=how).params(mesh)) / 2**30
        for how in ("none", "int8", "int4")
    ]
    assert sizes[0] == pytest.approx(14.96, abs=0.02)
    assert 7.4 < sizes[1] < 9
    assert 3.7 < sizes[2] < 6
