"""Tracing some steps of a run for XProf."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
import tiny_runs

from prefix_jax.errors import NonFiniteError
from prefix_jax.runs.profiler import Profiler

pytestmark = pytest.mark.usefixtures("without_plot")


def no_trace_is_running(tmp_path: Path) -> bool:
    """JAX refuses to start a second trace."""
    with jax.profiler.trace(tmp_path / "next"):
        return True


def test_writes_a_trace_of_the_requested_steps(tiny_model_dir: Path, tmp_path: Path) -> None:
    traced, plain = tmp_path / "traced", tmp_path / "plain"
    pretrained = tiny_runs.on_one_device(tiny_model_dir)
    tiny_runs.run(pretrained, traced, "train.profile_steps=2", "train.steps=6")
    (trace,) = traced.glob("profile/plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 0
    # XProf separates steps by these annotations.
    content = trace.read_bytes()
    assert b"step_num" in content

    tiny_runs.run(pretrained, plain, "train.steps=6")
    assert not (plain / "profile").exists()
    assert tiny_runs.metrics(traced) == tiny_runs.metrics(plain)


def test_writes_the_trace_of_a_run_that_ends_early(tiny_model_dir: Path, tmp_path: Path) -> None:
    tiny_runs.run(
        tiny_runs.on_one_device(tiny_model_dir), tmp_path, "train.profile_steps=50", "train.steps=4"
    )
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))


def test_starts_no_trace_at_the_last_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    tiny_runs.run(
        tiny_runs.on_one_device(tiny_model_dir), tmp_path, "train.profile_steps=1", "train.steps=2"
    )
    assert not (tmp_path / "profile").exists()
    assert no_trace_is_running(tmp_path)


def test_failure_ends_the_trace(tmp_path: Path) -> None:
    profile = Profiler(tmp_path / "failed", 0, 5)
    profile.start()
    with pytest.raises(NonFiniteError), profile:
        raise NonFiniteError("step 3: loss nan")
    assert list(tmp_path.glob("failed/plugins/profile/*/*.xplane.pb"))
    assert no_trace_is_running(tmp_path)
