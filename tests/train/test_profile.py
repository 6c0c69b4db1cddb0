"""Some steps of a run are traced for XProf."""

from __future__ import annotations

from pathlib import Path

import runs


def test_a_run_leaves_a_trace_of_the_steps_asked_for(tiny_model_dir: Path, tmp_path: Path) -> None:
    traced, plain = tmp_path / "traced", tmp_path / "plain"
    pretrained = runs.on_one_device(tiny_model_dir)
    runs.run(pretrained, traced, "train.profile=2", "train.steps=6")
    (trace,) = traced.glob("profile/plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 0
    # XProf tells steps apart by these marks: the third and the fourth.
    content = trace.read_bytes()
    assert b"step_num" in content

    runs.run(pretrained, plain, "train.steps=6")
    assert not (plain / "profile").exists()
    assert runs.metrics(traced) == runs.metrics(plain)


def test_a_run_that_ends_first_leaves_what_it_traced(tiny_model_dir: Path, tmp_path: Path) -> None:
    runs.run(runs.on_one_device(tiny_model_dir), tmp_path, "train.profile=50", "train.steps=4")
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
