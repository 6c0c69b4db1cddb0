"""Batch search. Nothing is compiled: a formula replaces the compiler."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from plans import SINGLE, config_of, formula

from prefix_jax.plan import batch, report
from prefix_jax.plan.abstract import AbstractRun, BatchShape
from prefix_jax.plan.plan import Plan
from prefix_jax.plan.topology import GIB, Topology


@pytest.mark.parametrize("largest", [1, 2, 7, 48, 1000])
def test_largest_batch_needs_few_programs(
    folder: Path, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Superlinear at first, because some buffers are shared.
    compile_step, seen = formula(
        lambda shape, _: 3 + 13 * (shape.rows / 4 / (largest + 0.5)) ** 0.9
    )
    monkeypatch.setattr(batch, "compile_step", compile_step)
    topology, run = Topology.parse("v5e:2x2"), AbstractRun.of(config_of(folder))
    mesh = topology.mesh({"data": 2, "fsdp": 2, "tensor": 1})
    result = batch.largest_batch(run, BatchShape(8, 16, 16), topology, mesh)
    assert result.rows == 4 * largest
    assert result.plan.fits
    assert result.above is not None
    assert result.above.batch.rows == 4 * largest + 4
    assert result.compiled == len(seen) <= 8


@pytest.mark.parametrize("again", [1.0, 1.3])
def test_reports_a_smaller_batch_with_higher_throughput(
    folder: Path, monkeypatch: pytest.MonkeyPatch, again: float
) -> None:
    """The compiler recomputes values to save memory: here above 14 GiB."""
    compile_step, _ = formula(lambda shape, _: 3 + shape.rows)

    def timed(run: AbstractRun, shape: BatchShape, *where: Any) -> Plan:
        compiled = compile_step(run, shape, *where)
        if compiled.roofline is None:
            return compiled
        seconds = shape.rows * (again if shape.rows > 11 else 1.0)
        return dataclasses.replace(
            compiled, roofline=dataclasses.replace(compiled.roofline, seconds=seconds)
        )

    monkeypatch.setattr(batch, "compile_step", timed)
    topology, run = Topology.parse("v5e:1x1"), AbstractRun.of(config_of(folder))
    largest = batch.largest_batch(run, BatchShape(8, 16, 16), topology, topology.mesh(SINGLE))
    assert largest.rows == 13
    line = report.largest_line(largest)
    assert ("tokens per second" in line) == (again > 1)
    if again > 1:
        assert largest.quickest.batch.rows <= 11
        assert f"12 tokens per second with 13 rows, 16 with {largest.quickest.batch.rows}." in line
        assert report.largest_as_json(largest)["quickest"]["batch"]["rows"] <= 11


@pytest.mark.parametrize("planned", [4, 28, 40])
def test_search_starts_from_the_known_plan(
    folder: Path, planned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_step, seen = formula(lambda shape, _: 2 + shape.rows / 2)
    monkeypatch.setattr(batch, "compile_step", compile_step)
    topology, run = Topology.parse("v5e:2x2"), AbstractRun.of(config_of(folder))
    mesh, shape = topology.mesh({"data": 4, "fsdp": 1, "tensor": 1}), BatchShape(planned, 16, 16)
    known = compile_step(run, shape, topology, mesh)
    result = batch.largest_batch(run, shape, topology, mesh, known=known)
    assert result.rows == 28
    assert result.above is not None
    assert result.above.batch.rows == 32
    assert result.compiled == len(seen)
    assert [plan.batch.rows for plan in seen].count(planned) == 1


def test_reports_the_smallest_batch_if_none_fits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_step, seen = formula(lambda shape, _: 20.0)
    monkeypatch.setattr(batch, "compile_step", compile_step)
    topology, run = Topology.parse("v5e:1x1"), AbstractRun.of(config_of(folder))
    mesh = topology.mesh(SINGLE)
    largest = batch.largest_batch(run, BatchShape(8, 16, 16), topology, mesh)
    assert (largest.rows, largest.compiled, largest.plan.over) == (0, 1, 4 * GIB)
    assert len(seen) == 1


def test_tiny_memory_shortage_is_not_reported_as_zero(
    folder: Path,
) -> None:
    compile_step, _ = formula(lambda shape, _: 16.0)
    topology, run = Topology.parse("v5e:1x1"), AbstractRun.of(config_of(folder))
    fits = compile_step(run, BatchShape(8, 16, 16), topology, topology.mesh(SINGLE))
    failed = dataclasses.replace(fits, memory=None, roofline=None)
    largest = batch.Largest(8, fits, fits, failed, compiled=2)
    assert "; 8 would be less than 0.01 GiB over the limit" in report.largest_line(largest)


def test_search_ends_at_the_maximum_and_reports_the_mesh(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_step, _ = formula(lambda shape, _: 1.0)
    monkeypatch.setattr(batch, "compile_step", compile_step)
    topology, run = Topology.parse("v5e:2x2"), AbstractRun.of(config_of(folder))
    largest = batch.largest_batch(run, BatchShape(8, 16, 16), topology, topology.mesh({"data": 4}))
    line = report.largest_line(largest)
    assert line.startswith("16384 rows fit on data=4 x fsdp=1 x tensor=1 (1.00 GiB per device); ")
    assert "more were not tried" in line
