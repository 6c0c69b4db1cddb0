"""Saving, restoring and deleting checkpoints."""

from __future__ import annotations

import socket
import subprocess
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_process import run_script
from checkpoint_states import bits, content, names, one_device, place, replicated_like, state_of
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from prefix_jax.config import OptimConfig
from prefix_jax.mesh import make_mesh, replicated
from prefix_jax.runs import checkpoint_store
from prefix_jax.runs.checkpoint_store import SUMS
from prefix_jax.runs.checkpoints import Checkpoints
from prefix_jax.train.optimizer import make_optimizer
from prefix_jax.train.partition import labels, split
from prefix_jax.train.step import TrainState


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


def test_restores_nothing_without_checkpoints(checkpoints):
    assert checkpoints.steps() == []
    assert checkpoints.latest() is None
    assert checkpoints.restore_latest(state_of(0)) is None


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
