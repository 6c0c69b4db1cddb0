"""A plan says what the TPU's compiler says, and finds its way among batches and meshes."""

import dataclasses
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny

from prefix_jax import config as configs
from prefix_jax.errors import ConfigError, MeshError
from prefix_jax.plan import auto, batch, remedies, report
from prefix_jax.plan.abstract import AbstractRun, Rows
from prefix_jax.plan.floor import floor
from prefix_jax.plan.plan import Memory, Plan, plan
from prefix_jax.plan.plan import _memory as memory_of
from prefix_jax.plan.roofline import Exchange, Roofline
from prefix_jax.plan.topology import GIB, Topology

TINY = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
}
ALONE = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is a config and nothing else."""
    made = tmp_path_factory.mktemp("tiny")
    (made / "config.json").write_text(json.dumps(TINY))
    return made


def config_of(path: Path | str, *overrides: str) -> configs.Config:
    values = {
        "model": {"path": str(path)},
        "data": {"target": "{text}", "max_length": 16},
        "method": {"name": "prefix", "length": 4},
        "train": {"steps": 1},
        "output": "plan",
    }
    return configs.parse(values, overrides)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Plan:
    return plan(config_of(folder, "mesh.tensor=2"), "v5e:2x2")


def test_a_step_is_compiled_from_a_config_alone(trained: Plan) -> None:
    assert trained.fits
    assert trained.over == 0
    assert trained.mesh == {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 2}
    assert trained.rows == Rows(8, 16, 16)
    memory, found = trained.memory, trained.roofline
    assert memory is not None
    assert found is not None
    assert trained.floor is not None
    assert memory.weights <= memory.arguments < memory.total == trained.needs < memory.limit
    # Half of the matrices: two devices hold each.
    count = 2 * 128 * 32 + 2 * (32 * 16 * 4 + 3 * 32 * 64)
    assert count < memory.weights < 2 * count
    # Nothing of it is computed twice; the compiler may leave out what nobody needs.
    assert 0.8 < found.flops * 4 / trained.floor < 1.2
    assert found.moved > memory.weights
    assert found.exchanges["all-reduce"].count >= 2 * 2  # of a layer, forwards and backwards
    assert found.seconds >= max(found.compute, found.memory)
    assert found.sent == sum(one.sent for one in found.exchanges.values())
    rate = trained.tokens_per_second
    assert rate == pytest.approx(8 * 16 / found.seconds)


def test_a_step_needs_what_lives_at_once_and_not_all_of_its_temporaries() -> None:
    # What the compiler said of 561 rows of a small Llama, in MiB. It refused 562 for 15.77 GiB.
    stats = types.SimpleNamespace(
        argument_size_in_bytes=17,
        temp_size_in_bytes=21_460,
        peak_memory_in_bytes=16_093,
        generated_code_size_in_bytes=18,
        output_size_in_bytes=0,
        alias_size_in_bytes=0,
    )
    compiled: Any = types.SimpleNamespace(memory_analysis=lambda: stats)
    found = memory_of(compiled, {}, 16_128)
    assert found == Memory(0, 17, 16_093 + 18 - 17, 16_093 + 18, 16_128)
    assert found.total <= found.limit


def test_decoding_writes_a_token_for_every_row(folder: Path) -> None:
    found = plan(config_of(folder, "data.batch_size=4"), "v5e:1x1", tokens=32, job="decode")
    assert found.memory is not None
    assert found.roofline is not None
    cache = 2 * 2 * 4 * 2 * 32 * 8 * 2
    assert found.memory.arguments >= found.memory.weights + cache
    assert found.tokens_per_second == pytest.approx(4 / found.roofline.seconds)


def test_what_does_not_fit_is_an_answer() -> None:
    config = config_of("preset:llama-3-70b", "data.batch_size=1")
    found = plan(config, "v5e:1x1", tokens=256)
    assert not found.fits
    assert found.over == found.needs - found.limit > 50 * GIB
    assert found.memory is found.roofline is found.tokens_per_second is None


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        ((), {"tokens": 0}, "--tokens 0: a row has 2 tokens at least"),
        ((), {"tokens": 1}, "--tokens 1: a row has 2 tokens at least"),
        ((), {"tokens": 3000}, "and 2044 fit the model's"),
        ((), {"targets": 17}, "--targets 17: a row has 1 at least, and 16 at most"),
        ((), {"targets": 0}, "--targets 0: a row has 1 at least, and 16 at most"),
        ((), {"targets": 5, "job": "decode"}, "--targets 5: nothing is learnt"),
        (
            (
                "task.name=classify",
                "data.target=null",
                "data.input={a}",
                "model.path=preset:t5-large",
            ),
            {},
            "heads read an encoder or a decoder, and preset:t5-large is both",
        ),
        (("task.name=classify", "data.target=null", "data.input={a}"), {"job": "decode"}, "labels"),
    ],
)
def test_what_does_not_fit_the_model_is_said(
    folder: Path, overrides: tuple[str, ...], arguments: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(config_of(folder, *overrides), "v5e:1x1", **arguments)


def test_rows_have_to_divide_over_the_mesh(folder: Path) -> None:
    with pytest.raises(MeshError, match=r"data\.batch_size 6 does not divide over 4"):
        plan(config_of(folder, "data.batch_size=6"), "v5e:2x2")


def test_micro_batches_are_of_training_alone(folder: Path) -> None:
    config = config_of(folder, "optim.accumulate=4")
    assert AbstractRun.of(config).rows() == Rows(8, 16, 16, micro=4)
    assert AbstractRun.of(config, "decode").rows() == Rows(8, 16, 16, micro=1)


def test_what_a_decoder_writes_fits_its_positions(tmp_path: Path) -> None:
    bart = {"d_model": 32, "vocab_size": 64, "max_position_embeddings": 40, "eos_token_id": 2}
    for stack in ("encoder", "decoder"):
        bart |= {f"{stack}_{what}": size for what, size in
                 (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bart", **bart}))
    config = config_of(tmp_path, "method.sites=[decoder]", "data.max_length=40")
    run = AbstractRun.of(config)
    assert run.rows() == Rows(8, tokens=36, targets=36, source=40)
    with pytest.raises(ConfigError, match="--targets 37: a row has 1 at least, and 36 at most"):
        run.rows(targets=37)


# From here on nothing is compiled: a formula says what a step needs.


def formula(needs: Callable[[Rows, Any], float], seconds: Callable[[Any], float] = lambda _: 1.0):
    """A stand-in for `compile_step`."""
    seen: list[Plan] = []

    def compile_step(run: AbstractRun, rows: Rows, topology: Topology, mesh: Any) -> Plan:
        total, limit = int(needs(rows, mesh.shape) * GIB), 16 * GIB
        fits = total <= limit
        times = seconds(mesh.shape)
        exchanges = {"all-reduce": Exchange(1, 1, 0.0)}
        made = Plan(
            model="model",
            method="prefix",
            quantize="none",
            topology=str(topology),
            chips=topology.chips,
            devices=mesh.size,
            mesh=dict(mesh.shape),
            job="train",
            rows=rows,
            needs=total,
            limit=limit,
            memory=Memory(0, 0, 0, total, limit) if fits else None,
            floor=None,
            roofline=Roofline(1, 1, exchanges, times, 0.0, 0.0, times) if fits else None,
            compile_seconds=0.0,
        )
        seen.append(made)
        return made

    return compile_step, seen


@pytest.mark.parametrize("largest", [1, 2, 7, 48, 1000])
def test_the_largest_batch_takes_few_programs(
    folder: Path, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More than linear at first, as some buffers are shared.
    compile_step, seen = formula(lambda rows, _: 3 + 13 * (rows.rows / 4 / (largest + 0.5)) ** 0.9)
    monkeypatch.setattr(batch, "compile_step", compile_step)
    topology, run = Topology.parse("v5e:2x2"), AbstractRun.of(config_of(folder))
    mesh = topology.mesh({"data": 2, "fsdp": 2, "tensor": 1})
    found = batch.largest_batch(run, Rows(8, 16, 16), topology, mesh)
    assert found.rows == 4 * largest
    assert found.plan.fits
    assert found.above is not None
    assert found.above.rows.rows == 4 * largest + 4
    assert found.compiled == len(seen) <= 8


@pytest.mark.parametrize("again", [1.0, 1.3])
def test_a_smaller_batch_that_reads_more_tokens_a_second_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, again: float
) -> None:
    """Where the compiler computes things again to save memory: in more than 14 GiB, here."""
    compile_step, _ = formula(lambda rows, _: 3 + rows.rows)

    def timed(run: AbstractRun, rows: Rows, *where: Any) -> Plan:
        found = compile_step(run, rows, *where)
        if found.roofline is None:
            return found
        seconds = rows.rows * (again if rows.rows > 11 else 1.0)
        return dataclasses.replace(
            found, roofline=dataclasses.replace(found.roofline, seconds=seconds)
        )

    monkeypatch.setattr(batch, "compile_step", timed)
    topology, run = Topology.parse("v5e:1x1"), AbstractRun.of(config_of(folder))
    found = batch.largest_batch(run, Rows(8, 16, 16), topology, topology.mesh(ALONE))
    assert found.rows == 13
    said = report.largest_line(found)
    assert ("tokens a second" in said) == (again > 1)
    if again > 1:
        assert found.quickest.rows.rows <= 11
        assert f"12 tokens a second at most, and {found.quickest.rows.rows} rows 16." in said
        assert report.largest_as_json(found)["quickest"]["rows"]["rows"] <= 11


@pytest.mark.parametrize("planned", [4, 28, 40])
def test_the_search_for_the_largest_batch_begins_with_what_was_planned(
    folder: Path, planned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_step, seen = formula(lambda rows, _: 2 + rows.rows / 2)
    monkeypatch.setattr(batch, "compile_step", compile_step)
    topology, run = Topology.parse("v5e:2x2"), AbstractRun.of(config_of(folder))
    mesh, rows = topology.mesh({"data": 4, "fsdp": 1, "tensor": 1}), Rows(planned, 16, 16)
    known = compile_step(run, rows, topology, mesh)
    found = batch.largest_batch(run, rows, topology, mesh, known=known)
    assert found.rows == 28
    assert found.above is not None
    assert found.above.rows.rows == 32
    assert found.compiled == len(seen)
    assert [plan.rows.rows for plan in seen].count(planned) == 1


def test_where_no_batch_fits_the_smallest_says_by_how_much(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_step, seen = formula(lambda rows, _: 20.0)
    monkeypatch.setattr(batch, "compile_step", compile_step)
    topology, run = Topology.parse("v5e:1x1"), AbstractRun.of(config_of(folder))
    mesh = topology.mesh(ALONE)
    found = batch.largest_batch(run, Rows(8, 16, 16), topology, mesh)
    assert (found.rows, found.compiled, found.plan.over) == (0, 1, 4 * GIB)
    assert len(seen) == 1


def test_a_step_that_lacks_less_than_the_compiler_tells_is_not_said_to_lack_nothing(
    folder: Path,
) -> None:
    compile_step, _ = formula(lambda rows, _: 16.0)
    topology, run = Topology.parse("v5e:1x1"), AbstractRun.of(config_of(folder))
    fits = compile_step(run, Rows(8, 16, 16), topology, topology.mesh(ALONE))
    failed = dataclasses.replace(fits, memory=None, roofline=None)
    found = batch.Largest(8, fits, fits, failed, compiled=2)
    assert "; 8 take less than 0.01 GiB too much" in report.largest_line(found)


def test_the_largest_batch_is_that_of_a_mesh_and_of_those_that_were_tried(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_step, _ = formula(lambda rows, _: 1.0)
    monkeypatch.setattr(batch, "compile_step", compile_step)
    topology, run = Topology.parse("v5e:2x2"), AbstractRun.of(config_of(folder))
    found = batch.largest_batch(run, Rows(8, 16, 16), topology, topology.mesh({"data": 4}))
    said = report.largest_line(found)
    assert said.startswith("16384 rows fit on data=4 x fsdp=1 x tensor=1 (1.00 GiB a device), and ")
    assert "more were not tried" in said


def test_figures_of_a_small_step_are_not_told_as_nothing(folder: Path) -> None:
    compile_step, _ = formula(lambda rows, _: 1.0, lambda _: 0.000661)
    topology, run = Topology.parse("v5e:1x1"), AbstractRun.of(config_of(folder))
    made = compile_step(run, Rows(8, 16, 16), topology, topology.mesh(ALONE))
    assert made.roofline is not None
    made = dataclasses.replace(made, roofline=dataclasses.replace(made.roofline, flops=2_100_000))
    assert "at least 0.661 ms" in report.line(made)
    said = [figures for _, _, figures in report._lines(made)]
    assert any(figures.startswith("0.002 GFLOP a device") for figures in said)


def test_weights_stay_whole_where_they_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_step, seen = formula(lambda rows, mesh: 4.0)
    monkeypatch.setattr(auto, "compile_step", compile_step)
    run = AbstractRun.of(config_of(folder, "data.batch_size=16"))
    choice = auto.choose_mesh(run, run.rows(), Topology.parse("v5e:4x4"))
    assert choice.best.mesh == {"data": 16, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert len(seen) <= 3 < choice.possible


def test_weights_are_split_where_they_do_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_step, _ = formula(lambda rows, mesh: 40.0 / mesh["fsdp"] / mesh["tensor"])
    monkeypatch.setattr(auto, "compile_step", compile_step)
    run = AbstractRun.of(config_of(folder, "data.batch_size=16"))
    best = auto.choose_mesh(run, run.rows(), Topology.parse("v5e:4x4")).best
    assert best.fits
    assert best.mesh["fsdp"] * best.mesh["tensor"] == 4


def test_no_mesh_is_guessed_to_be_slower_than_what_it_has_to_compute(tmp_path: Path) -> None:
    # Each stack of an encoder-decoder reads tokens of its own, and the head targets alone.
    t5 = tiny.T5_CONFIG | {"d_model": 512, "d_ff": 2048, "d_kv": 64, "vocab_size": 32_000}
    (tmp_path / "config.json").write_text(json.dumps(t5))
    run = AbstractRun.of(config_of(tmp_path, "data.max_length=256", "data.batch_size=64"))
    rows, topology = run.rows(targets=16), Topology.parse("v5e:1x1")
    least = floor(
        run.model.backbone.arch, rows=64, tokens=16, targets=16, source=256, produced=None
    )
    guessed = auto.guess(run, rows, topology, ALONE)
    assert 0.5 * least.total < guessed.seconds * topology.chip.bf16 < least.total


def test_a_mesh_has_as_many_batch_shards_as_rows_divide_by(folder: Path) -> None:
    run = AbstractRun.of(config_of(folder, "data.batch_size=2"))
    sizes = list(auto.meshes(run, run.rows(), Topology.parse("v5e:2x4")))
    assert sizes
    assert all(2 % (mesh["data"] * mesh["fsdp"]) == 0 for mesh in sizes)
    run = AbstractRun.of(config_of(folder, "data.batch_size=3"))
    with pytest.raises(MeshError, match="3 rows in 1 micro-batches divide over no mesh of 8"):
        auto.choose_mesh(run, run.rows(), Topology.parse("v5e:2x4"))


def test_devices_share_columns_where_there_are_no_rows_for_them(folder: Path) -> None:
    """Of rows that are long enough, and only then."""
    topology = Topology.parse("v5e:2x4")

    def shares(rows: int, tokens: int, *overrides: str) -> set[tuple[int, int]]:
        run = AbstractRun.of(config_of(folder, *overrides))
        sizes = auto.meshes(run, Rows(rows, tokens, tokens, micro=1), topology)
        return {(mesh["data"] * mesh["fsdp"], mesh["sequence"]) for mesh in sizes}

    assert shares(8, 8192) == {(8, 1), (4, 1), (2, 1)}
    # 4 heads: no more than 4 devices share a layer.
    assert shares(1, 8192) == {(1, 8), (1, 4), (1, 2)}
    assert shares(2, 4096) == {(2, 1), (2, 4), (2, 2)}
    assert shares(1, 1024) == set()


def test_every_host_of_a_mesh_has_rows_of_its_own(folder: Path) -> None:
    """Or the run would be refused that `mesh: auto` had chosen it for."""
    devices: Any = tuple(types.SimpleNamespace(process_index=number // 4) for number in range(8))
    topology = Topology("v5e", (2, 4), attached=devices)
    run = AbstractRun.of(config_of(folder))
    sizes = list(auto.meshes(run, Rows(2, 8192, 8192), topology))
    assert {mesh["data"] * mesh["fsdp"] for mesh in sizes} == {2}
    assert {mesh["sequence"] for mesh in sizes} == {1, 2, 4}
    with pytest.raises(MeshError, match=r"1 rows in .* no mesh of 8 devices on 2 hosts"):
        auto.choose_mesh(run, Rows(1, 8192, 8192), topology)


def test_what_would_make_a_step_fit_is_tried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_step, _ = formula(lambda rows, mesh: 2 + 2 * rows.rows / rows.micro / mesh["tensor"])
    monkeypatch.setattr(remedies, "compile_step", compile_step)
    run = AbstractRun.of(config_of(folder, "data.batch_size=16"))
    rows, topology = run.rows(), Topology.parse("v5e:1x1")
    failed = compile_step(run, rows, topology, topology.mesh(ALONE))
    found = remedies.remedies(failed, run, rows, topology)
    assert [(one.settings, one.plan.fits) for one in found] == [
        ("model.remat=full", False),
        ("model.quantize=int8", False),
        ("optim.accumulate=2", False),
        ("optim.accumulate=16", True),
    ]


def test_meshes_that_would_make_a_step_fit_are_named_in_full(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_step, _ = formula(lambda rows, mesh: 20.0 + mesh["data"])
    monkeypatch.setattr(remedies, "compile_step", compile_step)
    run = AbstractRun.of(config_of(folder, "mesh.fsdp=2", "mesh.tensor=2", "data.batch_size=4"))
    rows, topology = Rows(4, 8192, 8192), Topology.parse("v5e:2x4")
    failed = compile_step(run, rows, topology, topology.mesh(run.config.mesh.sizes))
    found = remedies.remedies(failed, run, rows, topology)
    settings = [one.settings for one in found if one.settings.startswith("mesh")]
    assert settings == ["mesh.fsdp=4", "mesh.fsdp=4 mesh.sequence=2 mesh.tensor=1"]
    for setting in settings:
        changed = config_of(folder, "mesh.fsdp=2", "mesh.tensor=2", *setting.split())
        assert topology.mesh(changed.mesh.sizes).size == 8


def test_copies_of_weights_that_stay_within_a_slice_are_guessed_to_be_faster() -> None:
    """For the network between slices is slower than the links within one."""
    run = AbstractRun.of(config_of("preset:llama-3-8b", "data.batch_size=16"))
    topology = Topology.parse("2*v5e:2x4")

    def seconds(data: int, fsdp: int) -> float:
        sizes = {"data": data, "fsdp": fsdp, "sequence": 1, "tensor": 1}
        return auto.guess(run, run.rows(256), topology, sizes).seconds

    assert seconds(data=2, fsdp=8) < 0.5 * seconds(data=1, fsdp=16)


def test_layers_are_not_split_across_slices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_step, _ = formula(lambda rows, mesh: 20.0 + mesh["data"])
    monkeypatch.setattr(remedies, "compile_step", compile_step)
    run = AbstractRun.of(config_of(folder, "mesh.data=1", "mesh.fsdp=8", "data.batch_size=8"))
    rows, topology = Rows(1, 8192, 8192), Topology.parse("2*v5e:2x2")
    failed = compile_step(run, rows, topology, topology.mesh(run.config.mesh.sizes))
    found = remedies.remedies(failed, run, rows, topology)
    assert found
    assert all(one.plan.mesh["sequence"] * one.plan.mesh["tensor"] <= 4 for one in found)


def test_on_one_device_there_is_one_mesh(folder: Path) -> None:
    config = config_of(folder, "mesh=auto")
    assert config.mesh.auto
    settled = auto.settle(config, jax.devices()[:1])
    assert settled.mesh.sizes == {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert auto.settle(settled) is settled
    with pytest.raises(MeshError, match="goes by the figures of TPUs"):
        auto.settle(config, jax.devices())


def test_auto_takes_no_sizes(folder: Path) -> None:
    with pytest.raises(ConfigError, match="auto chooses data, fsdp, sequence and tensor"):
        config_of(folder, "mesh=auto", "mesh.fsdp=2")


def test_what_is_quantised_counts_by_its_bits(folder: Path) -> None:
    from prefix_jax.plan.plan import bytes_on_one

    run = AbstractRun.of(config_of("preset:llama-3-8b"))
    mesh = Topology.parse("v5e:1x1").mesh(ALONE)
    sizes = [
        bytes_on_one(run.with_model(quantize=how).params(mesh)) / 2**30
        for how in ("none", "int8", "int4")
    ]
    assert sizes[0] == pytest.approx(14.96, abs=0.02)
    assert 7.4 < sizes[1] < 9
    assert 3.7 < sizes[2] < 6
