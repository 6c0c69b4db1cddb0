"""Saves that fail or are killed leave a complete checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from checkpoint_process import run_script
from checkpoint_states import bits, content, names, state_of

from prefix_jax.errors import CheckpointError
from prefix_jax.runs import checkpoint_store
from prefix_jax.runs.checkpoints import Checkpoints


def test_directory_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="choose another output_dir"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1, warn=print)


def test_error_of_the_run_takes_precedence_over_a_failed_save(tmp_path, warned, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    def run(error: BaseException | None):
        with Checkpoints(tmp_path, keep=1, warn=warned.append) as opened:
            opened.save(1, state_of(1), {})
            if error:
                raise error

    monkeypatch.setattr(checkpoint_store, "_seal", full)
    with pytest.raises(KeyboardInterrupt):
        run(KeyboardInterrupt())
    assert "No space left" in warned[0]
    assert names(tmp_path) == []
    with pytest.raises(CheckpointError, match="No space left"):
        run(None)


def test_full_disk_is_an_error_and_keeps_earlier_checkpoints(tmp_path):
    process = run_script("full-disk", tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    messages = json.loads(out)
    assert len(messages) == 3
    for message in messages:
        assert f"step 2 to {tmp_path}" in message
        assert "MB free" in message
        assert "File too large" in message
        assert "to resume from step 1" in message
    with Checkpoints(tmp_path, keep=1, warn=pytest.fail) as checkpoints:
        assert names(tmp_path) == ["2"]
        assert bits(checkpoints.restore_latest(state_of(0))[0]) == bits(content(2))


def test_directory_replaced_by_a_file_is_one_error(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, warn=pytest.fail)
    checkpoints.save(1, state_of(1), {})
    checkpoints.wait()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("")
    failure = pytest.raises(CheckpointError, match=r"checkpoint of step 2 .*from step 0$")
    with failure, checkpoints:
        checkpoints.save(2, state_of(2), {})


class Killed(BaseException):
    """Simulates the end of the process."""


@pytest.mark.parametrize("step", [1, 2])
def test_save_killed_at_any_disk_operation_leaves_a_complete_checkpoint(
    tmp_path, monkeypatch, step
):
    """A save of step 2, or of step 1 which exists, is killed at each disk operation in turn."""
    with Checkpoints(tmp_path / "first", keep=1, warn=pytest.fail) as checkpoints:
        checkpoints.save(1, state_of(1), {"save": 1})
    operations = [(os, "fsync"), (Path, "rename"), (Path, "write_text"), (os, "unlink")]
    remaining = 0

    def until_killed(original):
        def operation(*args, **kwargs):
            nonlocal remaining
            remaining -= 1
            if remaining < 0:
                raise Killed
            return original(*args, **kwargs)

        return operation

    for budget in range(100):
        directory = tmp_path / str(budget)
        shutil.copytree(tmp_path / "first", directory)
        checkpoints = Checkpoints(directory, keep=1, warn=pytest.fail)
        remaining = budget
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for owner, name in operations:
                patch.setattr(owner, name, until_killed(getattr(owner, name)))
            checkpoints.save(step, state_of(step + 1), {"save": 2})
            checkpoints.wait()
        with Checkpoints(directory, keep=1, warn=pytest.fail) as reopened:
            state, metadata = reopened.restore_latest(state_of(0))
            assert bits(state) == bits(content(1 if metadata["save"] == 1 else step + 1))
            # Every remaining directory is a complete checkpoint.
            for name in names(directory):
                reopened.restore(int(name), state)
        if remaining >= 0:
            break
    assert metadata["save"] == 2
    assert budget > 10


def test_resumes_after_a_kill_at_any_moment(tmp_path):
    seed = time.time_ns()
    print("seed", seed)
    moments = random.Random(seed)
    done = 0
    for _ in range(3):
        process = run_script("loop", tmp_path)
        for _ in range(moments.randint(1, 5)):
            # It resumes from the previous process, and fails if the state is wrong.
            line = process.stdout.readline()
            assert line, process.communicate()
            done = int(line)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        assert process.communicate()[1] == ""
        assert max(int(name) for name in names(tmp_path) if name.isdigit()) >= done
    with Checkpoints(tmp_path, keep=2, warn=pytest.fail) as checkpoints:
        state, metadata = checkpoints.restore_latest(state_of(0))
    assert metadata["step"] == int(state.step) >= done > 0
    assert bits(state) == bits(content(metadata["step"]))
