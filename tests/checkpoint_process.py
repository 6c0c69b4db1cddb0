"""Other processes that write checkpoints: on a full disk, until they are killed, or together."""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path

import jax
from checkpoint_states import bits, content, place, state_of
from forked import ForkedProcess
from jax.sharding import NamedSharding, PartitionSpec

from prefix_jax.errors import CheckpointError
from prefix_jax.mesh import make_mesh, replicated
from prefix_jax.runs.checkpoint_store import SUMS
from prefix_jax.runs.checkpoints import Checkpoints


def run_script(role: str, *arguments: object) -> ForkedProcess:
    """Starts a process in a role: "full-disk", "loop" or "process"."""
    roles = {"full-disk": fill_disk, "loop": save_until_killed, "process": run_process}
    return ForkedProcess(roles[role], *arguments)


def fill_disk(directory: Path) -> None:
    """Saves on a full disk: a limit on the size of its files acts like a full disk."""
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


def save_until_killed(directory: Path) -> None:
    """Resumes from the latest checkpoint, checks it, and saves one after another."""
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


def run_process(directory: Path, port: int, index: int) -> None:
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
