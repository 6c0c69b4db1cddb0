"""Damaged checkpoints, those of other runs, and names that are taken."""

from __future__ import annotations

import os
from pathlib import Path

import jax.numpy as jnp
import pytest
from checkpoint_states import bits, content, state_of
from orbax.checkpoint import v1 as ocp

from prefix_jax.errors import CheckpointError
from prefix_jax.runs.checkpoint_store import SUMS
from prefix_jax.runs.checkpoints import Checkpoints


def test_names_a_missing_checkpoint(checkpoints):
    checkpoints.save(3, state_of(3), {})
    checkpoints.wait()
    with pytest.raises(
        CheckpointError, match=r"checkpoint .*/7 does not exist; complete checkpoints: \[3\]"
    ):
        checkpoints.restore(7, state_of(0))


def damages(path: Path):
    """Truncates, empties, zeroes, changes and deletes every file, one at a time."""
    for file in sorted(file for file in Path(path).rglob("*") if file.is_file()):
        written = file.read_bytes()
        for damage in (
            lambda file, data: file.unlink(),
            lambda file, data: file.write_bytes(data[: len(data) // 2]),
            lambda file, data: file.write_bytes(b""),
            lambda file, data: file.write_bytes(bytes(len(data))),
            lambda file, data: file.write_bytes(data[:-1] + bytes([data[-1] ^ 4])),
        ):
            try:
                damage(file, written)
            except IndexError:
                continue
            if not file.exists() or file.read_bytes() != written:
                yield file
            file.write_bytes(written)


def test_skips_a_checkpoint_with_any_damage(checkpoints, warned):
    for step in (1, 2):
        checkpoints.save(step, state_of(step), {"step": step})
    checkpoints.wait()
    like = state_of(0)
    count = 0
    for count, file in enumerate(damages(checkpoints.directory / "2"), 1):
        state, metadata = checkpoints.restore_latest(like)
        assert metadata == {"step": 1}
        assert bits(state) == bits(content(1))
        assert len(warned) == count
        assert str(checkpoints.directory / "2") in warned[-1]
        if file.name != SUMS:
            assert str(file) in warned[-1]
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoints.restore(2, like)
    assert count > 30
    assert checkpoints.restore_latest(like)[1] == {"step": 2}


def test_damaged_checkpoints_do_not_count_and_are_deleted_at_the_next_save(checkpoints):
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step), {})
    checkpoints.wait()
    (checkpoints.directory / "3" / SUMS).unlink()
    state, _ = checkpoints.restore_latest(state_of(0))
    assert int(state.step) == 2
    assert checkpoints.steps() == [2, 3]
    # A run that resumes from step 2 may save more often than before.
    checkpoints.save(20, state_of(20), {})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 20]


def test_only_damaged_checkpoints_are_an_error(checkpoints):
    checkpoints.save(1, state_of(1), {})
    checkpoints.wait()
    (checkpoints.directory / "1" / SUMS).unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged; restore a copy"):
        checkpoints.restore_latest(state_of(0))


def test_disk_failure_after_verification_is_an_error(checkpoints, monkeypatch):
    checkpoints.save(1, state_of(1), {})
    checkpoints.wait()

    def fail(*_):
        raise ValueError("DATA_LOSS: input/output error")

    monkeypatch.setattr(ocp, "load", fail)
    with pytest.raises(CheckpointError, match=r"/1 cannot be read \(DATA_LOSS: input/output error"):
        checkpoints.restore(1, state_of(0))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            lambda: state_of(1, length=32),
            r"train/prefix/k is float32\[4, 16, 2, 8\], expected float32\[4, 32, 2, 8\], "
            r".* \(and 1 more\)",
        ),
        (
            lambda: state_of(1, dtype=jnp.bfloat16),
            r"train/prefix/k is float32\[4, 16, 2, 8\], expected bfloat16\[4, 16, 2, 8\]",
        ),
        (
            lambda: state_of(1).replace(train={"prefix": {"h": jnp.zeros((2, 3))}}),
            r"train/prefix/h is missing, expected float32\[2, 3\], "
            r"train/prefix/k is float32\[4, 16, 2, 8\], expected missing",
        ),
    ],
)
def test_names_the_arrays_that_differ_from_another_run(checkpoints, like, message):
    checkpoints.save(1, state_of(1), {})
    checkpoints.wait()
    for restore in (
        lambda: checkpoints.restore(1, like()),
        lambda: checkpoints.restore_latest(like()),
    ):
        with pytest.raises(CheckpointError, match=message) as raised:
            restore()
        assert f"choose another output_dir, or delete {checkpoints.directory}" in str(raised.value)


@pytest.mark.parametrize("kind", ["link", "file", "directory"])
@pytest.mark.parametrize("name", ["100", "100.new"])
def test_finds_a_taken_name_before_training_starts(tmp_path, warned, name, kind):
    taken = tmp_path / name
    if kind == "link":
        taken.symlink_to(tmp_path / "nowhere")
    elif kind == "file":
        taken.write_text("mine")
    else:
        taken.mkdir()
        (taken / "mine").write_text("")
    with pytest.raises(CheckpointError, match=rf"/{name} exists and is not a checkpoint, but a ch"):
        Checkpoints(tmp_path, keep=2, warn=warned.append, last_step=100)
    assert os.path.lexists(taken)


def test_ignores_names_that_no_later_checkpoint_needs(tmp_path, warned):
    with Checkpoints(tmp_path, keep=2, warn=warned.append, last_step=100) as checkpoints:
        checkpoints.save(7, state_of(7), {})
    for name in ("5", "101", "0100", "notes"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with Checkpoints(tmp_path, keep=2, warn=warned.append, last_step=100) as checkpoints:
        assert checkpoints.steps() == [7]
    assert warned == []
