"""Mesh search. Nothing is compiled: a formula replaces the compiler."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny
from plans import SINGLE, config_of, formula

from prefix_jax.errors import ConfigError, MeshError
from prefix_jax.plan import auto
from prefix_jax.plan.abstract import AbstractRun, BatchShape
from prefix_jax.plan.floor import floor
from prefix_jax.plan.topology import Topology


def test_weights_are_replicated_if_they_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_step, seen = formula(lambda shape, mesh: 4.0)
    monkeypatch.setattr(auto, "compile_step", compile_step)
    run = AbstractRun.of(config_of(folder, "data.batch_size=16"))
    choice = auto.choose_mesh(run, run.batch_shape(), Topology.parse("v5e:4x4"))
    assert choice.best.mesh == {"data": 16, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert len(seen) <= 3 < choice.possible


def test_weights_are_split_if_they_do_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_step, _ = formula(lambda shape, mesh: 40.0 / mesh["fsdp"] / mesh["tensor"])
    monkeypatch.setattr(auto, "compile_step", compile_step)
    run = AbstractRun.of(config_of(folder, "data.batch_size=16"))
    best = auto.choose_mesh(run, run.batch_shape(), Topology.parse("v5e:4x4")).best
    assert best.fits
    assert best.mesh["fsdp"] * best.mesh["tensor"] == 4


def test_guess_is_a_lower_bound_of_the_compute_time(tmp_path: Path) -> None:
    # Each stack of an encoder-decoder has its own tokens; the head reads only targets.
    t5 = tiny.T5_CONFIG | {"d_model": 512, "d_ff": 2048, "d_kv": 64, "vocab_size": 32_000}
    (tmp_path / "config.json").write_text(json.dumps(t5))
    run = AbstractRun.of(config_of(tmp_path, "data.max_length=256", "data.batch_size=64"))
    shape, topology = run.batch_shape(targets=16), Topology.parse("v5e:1x1")
    least = floor(
        run.model.backbone.arch, rows=64, tokens=16, targets=16, source=256, produced=None
    )
    guessed = auto.guess(run, shape, topology, SINGLE)
    assert 0.5 * least.total < guessed.seconds * topology.chip.bf16 < least.total


def test_rows_divide_over_batch_shards(folder: Path) -> None:
    run = AbstractRun.of(config_of(folder, "data.batch_size=2"))
    sizes = list(auto.meshes(run, run.batch_shape(), Topology.parse("v5e:2x4")))
    assert sizes
    assert all(2 % (mesh["data"] * mesh["fsdp"]) == 0 for mesh in sizes)
    run = AbstractRun.of(config_of(folder, "data.batch_size=3"))
    with pytest.raises(MeshError, match="3 rows in 1 micro-batches divide over no mesh of 8"):
        auto.choose_mesh(run, run.batch_shape(), Topology.parse("v5e:2x4"))


def test_devices_share_columns_if_there_are_too_few_rows(folder: Path) -> None:
    """Only if rows are long enough."""
    topology = Topology.parse("v5e:2x4")

    def shares(rows: int, tokens: int, *overrides: str) -> set[tuple[int, int]]:
        run = AbstractRun.of(config_of(folder, *overrides))
        sizes = auto.meshes(run, BatchShape(rows, tokens, tokens, micro=1), topology)
        return {(mesh["data"] * mesh["fsdp"], mesh["sequence"]) for mesh in sizes}

    assert shares(8, 8192) == {(8, 1), (4, 1), (2, 1)}
    # With 4 heads, at most 4 devices share a layer.
    assert shares(1, 8192) == {(1, 8), (1, 4), (1, 2)}
    assert shares(2, 4096) == {(2, 1), (2, 4), (2, 2)}
    assert shares(1, 1024) == set()


def test_every_host_has_its_own_rows(folder: Path) -> None:
    """Otherwise training would reject the mesh that `mesh: auto` has chosen."""
    devices: Any = tuple(types.SimpleNamespace(process_index=number // 4) for number in range(8))
    topology = Topology("v5e", (2, 4), attached=devices)
    run = AbstractRun.of(config_of(folder))
    sizes = list(auto.meshes(run, BatchShape(2, 8192, 8192), topology))
    assert {mesh["data"] * mesh["fsdp"] for mesh in sizes} == {2}
    assert {mesh["sequence"] for mesh in sizes} == {1, 2, 4}
    with pytest.raises(MeshError, match=r"1 rows in .* no mesh of 8 devices on 2 hosts"):
        auto.choose_mesh(run, BatchShape(1, 8192, 8192), topology)


def test_guess_prefers_weights_that_stay_within_a_slice() -> None:
    """The network between slices is slower than the links within one."""
    run = AbstractRun.of(config_of("preset:llama-3-8b", "data.batch_size=16"))
    topology = Topology.parse("2*v5e:2x4")

    def seconds(data: int, fsdp: int) -> float:
        sizes = {"data": data, "fsdp": fsdp, "sequence": 1, "tensor": 1}
        return auto.guess(run, run.batch_shape(256), topology, sizes).seconds

    assert seconds(data=2, fsdp=8) < 0.5 * seconds(data=1, fsdp=16)


def test_single_device_has_one_mesh(folder: Path) -> None:
    config = config_of(folder, "mesh=auto")
    assert config.mesh.auto
    settled = auto.settle(config, jax.devices()[:1])
    assert settled.mesh.sizes == {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert auto.settle(settled) is settled
    with pytest.raises(MeshError, match="supports only TPUs"):
        auto.settle(config, jax.devices())


def test_auto_rejects_sizes(folder: Path) -> None:
    with pytest.raises(ConfigError, match="auto chooses data, fsdp, sequence and tensor"):
        config_of(folder, "mesh=auto", "mesh.fsdp=2")
