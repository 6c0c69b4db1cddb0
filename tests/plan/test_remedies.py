"""Config changes for steps that do not fit. A formula replaces the compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
from plans import SINGLE, config_of, formula

from prefix_jax.plan import remedies
from prefix_jax.plan.abstract import AbstractRun, BatchShape
from prefix_jax.plan.topology import Topology


def test_tries_changes_until_a_step_fits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_step, _ = formula(lambda shape, mesh: 2 + 2 * shape.rows / shape.micro / mesh["tensor"])
    monkeypatch.setattr(remedies, "compile_step", compile_step)
    run = AbstractRun.of(config_of(folder, "data.batch_size=16"))
    shape, topology = run.batch_shape(), Topology.parse("v5e:1x1")
    failed = compile_step(run, shape, topology, topology.mesh(SINGLE))
    changes = remedies.remedies(failed, run, shape, topology)
    assert [(change.settings, change.plan.fits) for change in changes] == [
        ("model.remat=full", False),
        ("model.quantize=int8", False),
        ("optim.grad_accum_steps=2", False),
        ("optim.grad_accum_steps=16", True),
    ]


def test_suggested_meshes_are_complete_overrides(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_step, _ = formula(lambda shape, mesh: 20.0 + mesh["data"])
    monkeypatch.setattr(remedies, "compile_step", compile_step)
    run = AbstractRun.of(config_of(folder, "mesh.fsdp=2", "mesh.tensor=2", "data.batch_size=4"))
    shape, topology = BatchShape(4, 8192, 8192), Topology.parse("v5e:2x4")
    failed = compile_step(run, shape, topology, topology.mesh(run.config.mesh.sizes))
    changes = remedies.remedies(failed, run, shape, topology)
    settings = [change.settings for change in changes if change.settings.startswith("mesh")]
    assert settings == ["mesh.fsdp=4", "mesh.fsdp=4 mesh.sequence=2 mesh.tensor=1"]
    for setting in settings:
        changed = config_of(folder, "mesh.fsdp=2", "mesh.tensor=2", *setting.split())
        assert topology.mesh(changed.mesh.sizes).size == 8


def test_does_not_split_layers_across_slices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_step, _ = formula(lambda shape, mesh: 20.0 + mesh["data"])
    monkeypatch.setattr(remedies, "compile_step", compile_step)
    run = AbstractRun.of(config_of(folder, "mesh.data=1", "mesh.fsdp=8", "data.batch_size=8"))
    shape, topology = BatchShape(1, 8192, 8192), Topology.parse("2*v5e:2x2")
    failed = compile_step(run, shape, topology, topology.mesh(run.config.mesh.sizes))
    changes = remedies.remedies(failed, run, shape, topology)
    assert changes
    assert all(change.plan.mesh["sequence"] * change.plan.mesh["tensor"] <= 4 for change in changes)
