"""Saving and restoring checkpoints. Some tests run this file as a script in another process."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from prefix_jax.config import OptimConfig
from prefix_jax.errors import CheckpointError
from prefix_jax.mesh import make_mesh, replicated
from prefix_jax.runs import checkpoint_store
from prefix_jax.runs.checkpoint_store import SUMS
from prefix_jax.runs.checkpoints import Checkpoints
from prefix_jax.train.optimizer import make_optimizer
from prefix_jax.train.partition import labels, split
from prefix_jax.train.step import TrainState


def content(step: int, length: int = 16, dtype: object = np.float32) -> TrainState:
    """The state of the checkpoint of `step` in these tests, on the host."""
    rng = np.random.default_rng(step)
    arrays = [rng.standard_normal((4, length, 2, 8)).astype(dtype) for _ in range(4)]
    return TrainState(
        step=np.int32(step),
        train={"backbone": {"q_DNH": None}, "prefix": {"k": arrays[0], "v": arrays[1]}},
        optimizer=(optax.EmptyState(), {"mu": arrays[2], "hole": optax.MaskedNode()}, arrays[3]),
    )


def place(sharding: jax.sharding.Sharding, state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(
            leaf.shape, sharding if leaf.ndim else replicated_like(sharding), lambda i: leaf[i]
        ),
        state,
    )


def replicated_like(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    return replicated(sharding.mesh) if isinstance(sharding, NamedSharding) else sharding


def one_device() -> jax.sharding.Sharding:
    return SingleDeviceSharding(jax.devices()[0])


def state_of(step: int, **kwargs: object) -> TrainState:
    return place(one_device(), content(step, **kwargs))


def bits(state: TrainState) -> list[tuple[str, tuple[int, ...], bytes]]:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    return [(leaf.dtype.name, leaf.shape, leaf.tobytes()) for leaf in leaves]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def warned() -> list[str]:
    """Receives warnings."""
    return []


@pytest.fixture
def checkpoints(tmp_path, warned):
    with Checkpoints(tmp_path / "checkpoints", keep=2, warn=warned.append) as opened:
        yield opened


def run_script(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- Restoring -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.int8])
def test_restores_every_bit(checkpoints, dtype):
    state = state_of(7, dtype=dtype)
    special = jnp.array([0.0, -0.0, np.nan, -np.inf, 1e-40, 3.0000002], jnp.float32)
    state = state.replace(optimizer=(state.optimizer, special))
    checkpoints.save(7, state, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(7, state)
    assert bits(restored) == bits(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_restores_metadata(checkpoints):
    metadata = {
        "config": {"train": {"steps": 5, "epochs": None}, "data": {"input": "é {name}\n"}},
        "best": {"step": 3, "loss": 0.1 + 0.2},
        "none_yet": float("inf"),
        "position": 2**40,
        "mesh": [4, 2, 1],
    }
    checkpoints.save(1, state_of(1), metadata)
    checkpoints.wait()
    assert checkpoints.restore(1, state_of(1))[1] == metadata


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_restores_optimizer_state(checkpoints, name):
    params = {
        "backbone": {"q_DNH": jnp.ones((8, 2, 4))},
        "prefix": {"k": jnp.ones((2, 4, 2, 8)), "bias": jnp.ones(3)},
    }
    marks = labels(params)
    optimizer = make_optimizer(OptimConfig(name=name), optax.constant_schedule(0.1), marks)
    grads = jax.tree.map(lambda leaf: 0.1 * leaf, params)
    update = jax.jit(optimizer.update)
    moved = update(grads, optimizer.init(params), params)[1]
    state = TrainState(jnp.int32(1), split(params, marks)[0], moved)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(1, state)
    assert bits(restored) == bits(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    # The optimizer continues from the restored state.
    before, after = (update(grads, now.optimizer, params)[0] for now in (state, restored))
    assert bits(before) == bits(after)


@pytest.mark.parametrize("target", [(4, 2, 1), (2, 2, 2), None])
def test_restores_onto_another_mesh(checkpoints, target):
    assert jax.device_count() == 8
    spec = PartitionSpec("fsdp", ("data", "tensor"))
    checkpoints.save(1, place(NamedSharding(make_mesh(4, 2, 1), spec), content(1)), {})
    checkpoints.wait()
    sharding = one_device() if target is None else NamedSharding(make_mesh(*target), spec)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding if leaf.ndim else replicated_like(sharding)
        ),
        content(1),
    )
    restored, _ = checkpoints.restore(1, like)
    assert bits(restored) == bits(content(1))
    for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert leaf.sharding == expected.sharding


def test_state_may_be_donated_while_it_is_written(checkpoints):
    move = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    shardings = [one_device(), replicated(make_mesh(8, 1, 1))]
    for step in range(10):
        state = place(shardings[step % 2], content(step, length=4096))
        checkpoints.save(step, state, {})
        for _ in range(20):
            state = move(state)
        checkpoints.wait()
        assert bits(checkpoints.restore(step, state)[0]) == bits(content(step, length=4096))


def test_saving_is_silent(checkpoints, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            checkpoints.save(step, state_of(step), {})
        checkpoints.wait()
        checkpoints.restore_latest(state_of(0))
    assert capfd.readouterr() == ("", "")


# --- Retention -------------------------------------------------------------------------------


def test_keeps_the_latest_and_the_best(checkpoints):
    for step in range(1, 7):
        checkpoints.save(step, state_of(step), {}, best=2 if step >= 2 else None)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.latest() == 6
    assert names(checkpoints.directory) == ["2", "5", "6"]


def test_lists_a_checkpoint_only_once_it_is_complete(checkpoints, monkeypatch):
    seen = []
    seal = checkpoint_store._seal
    monkeypatch.setattr(
        checkpoint_store, "_seal", lambda path: (seen.append(checkpoints.steps()), seal(path))
    )
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step), {})
    checkpoints.wait()
    # The first one is deleted only after the third is complete.
    assert seen == [[], [1], [1, 2]]
    assert checkpoints.steps() == [2, 3]


def test_replaces_a_checkpoint_of_the_same_step(checkpoints):
    checkpoints.save(1, state_of(1), {"evaluated": False})
    checkpoints.save(1, state_of(2), {"evaluated": True})
    checkpoints.wait()
    state, metadata = checkpoints.restore(1, state_of(1))
    assert metadata == {"evaluated": True}
    assert bits(state) == bits(content(2))


def test_sha256sum_verifies_a_checkpoint(checkpoints):
    checkpoints.save(1, state_of(1), {})
    checkpoints.wait()
    subprocess.run(
        ["sha256sum", "--check", "--strict", SUMS],
        cwd=checkpoints.directory / "1",
        check=True,
        capture_output=True,
    )


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_plain_orbax_reads_a_checkpoint(checkpoints):
    checkpoints.save(1, state_of(1), {})
    checkpoints.wait()
    stored = ocp.load(checkpoints.directory / "1")
    assert np.array_equal(stored["train"]["prefix"]["k"], content(1).train["prefix"]["k"])


# --- Damage ----------------------------------------------------------------------------------


def test_restores_nothing_without_checkpoints(checkpoints):
    assert checkpoints.steps() == []
    assert checkpoints.latest() is None
    assert checkpoints.restore_latest(state_of(0)) is None


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


# --- Checkpoints of another run --------------------------------------------------------------


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


# --- Names that are taken --------------------------------------------------------------------


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


# --- Failures --------------------------------------------------------------------------------


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


def fill_disk(directory: Path) -> None:
    """The process of the test above. A limit on the size of its files acts like a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Checkpoints(directory, keep=1, warn=sys.exit) as checkpoints:
        checkpoints.save(1, state_of(1), {})
    messages = []
    # The limits are reached in the arrays, in Orbax's metadata, and at the first byte.
    for limit in (5000, 300, 0):
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with Checkpoints(directory, keep=1, warn=sys.exit) as checkpoints:
                checkpoints.save(2, state_of(2), {})
        except CheckpointError as error:
            messages.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        with Checkpoints(directory, keep=1, warn=sys.exit) as checkpoints:
            assert bits(checkpoints.restore_latest(state_of(0))[0]) == bits(content(1))
    with Checkpoints(directory, keep=1, warn=sys.exit) as checkpoints:
        checkpoints.save(2, state_of(2), {})
    sys.stdout.write(json.dumps(messages))


def test_directory_replaced_by_a_file_is_one_error(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, warn=pytest.fail)
    checkpoints.save(1, state_of(1), {})
    checkpoints.wait()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("")
    failure = pytest.raises(CheckpointError, match=r"checkpoint of step 2 .*from step 0$")
    with failure, checkpoints:
        checkpoints.save(2, state_of(2), {})


def test_disk_failure_after_verification_is_an_error(checkpoints, monkeypatch):
    checkpoints.save(1, state_of(1), {})
    checkpoints.wait()

    def fail(*_):
        raise ValueError("DATA_LOSS: input/output error")

    monkeypatch.setattr(ocp, "load", fail)
    with pytest.raises(CheckpointError, match=r"/1 cannot be read \(DATA_LOSS: input/output error"):
        checkpoints.restore(1, state_of(0))


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


def save_until_killed(directory: Path) -> None:
    """The process of the test above."""
    checkpoints = Checkpoints(directory, keep=2, warn=sys.exit)
    step = 0
    if restored := checkpoints.restore_latest(state_of(0)):
        state, metadata = restored
        step = metadata["step"]
        assert bits(state) == bits(content(step))
    while True:
        step += 1
        checkpoints.save(step, state_of(step), {"step": step}, best=step // 10 * 10)
        if step % 2:
            checkpoints.wait()
            print(step, flush=True)


# --- Several processes -----------------------------------------------------------------------


def test_several_processes_write_one_checkpoint(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [run_script("process", tmp_path, port, index) for index in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    with Checkpoints(tmp_path, keep=2, warn=pytest.fail) as checkpoints:
        assert checkpoints.steps() == [2, 4]
        assert bits(checkpoints.restore_latest(state_of(0))[0]) == bits(content(4))


def run_process(directory: Path, port: str, index: int) -> None:
    """One of two processes, with 8 devices each."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    assert (jax.process_count(), jax.device_count()) == (2, 16)
    before = NamedSharding(make_mesh(2, 8, 1), PartitionSpec(None, "fsdp"))
    after = NamedSharding(make_mesh(4, 2, 2), PartitionSpec("data", "tensor"))
    warned: list[str] = []
    with Checkpoints(directory, keep=2, warn=warned.append) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, place(before, content(step)), {"step": step})
        checkpoints.wait()
        if index == 0:
            (directory / "3" / SUMS).unlink()
        state, metadata = checkpoints.restore_latest(place(after, content(0)))
        assert metadata == {"step": 2}
        assert len(warned) == (index == 0), warned
        whole = jax.jit(lambda state: state, out_shardings=replicated(after.mesh))(state)
        assert bits(whole) == bits(content(2))
        checkpoints.save(4, place(after, content(4)), {"step": 4})


if __name__ == "__main__":
    role, directory, *rest = sys.argv[1:]
    if role == "full-disk":
        fill_disk(Path(directory))
    elif role == "loop":
        save_until_killed(Path(directory))
    else:
        run_process(Path(directory), rest[0], int(rest[1]))
