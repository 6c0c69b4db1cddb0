"""Training runs small enough for a test, and readers of their outputs."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from rich.console import Console

from prefix_jax import artifact, config
from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.mesh import make_mesh
from prefix_jax.runs.console import Console as RunConsole
from prefix_jax.runs.finish import RunResult
from prefix_jax.runs.run import run as run_config

# All have the same length, so that a run compiles its step once.
RECORDS = [{"sum": f"{i}+{j}", "total": f"{i + j:02d}"} for i in range(4) for j in range(5)]
# Evaluated on training records, because a random model cannot generalize.
SOME = RECORDS[6:10]


def on_one_device(model: Path) -> Pretrained:
    """Loads a model onto one of the test devices, where a step is cheapest."""
    return load(model, mesh=make_mesh(1, 1, 1, devices=jax.devices()[:1]))


def run(
    pretrained: Pretrained, output: Path, *overrides: str, console: Console | None = None, **records
) -> RunResult:
    """Trains for twelve steps by default.

    Args:
        pretrained: the backbone.
        output: the run directory.
        overrides: settings of the config.
        console: where progress is shown; None shows nothing.
        records: records by split; None uses the config's.
    """
    splits = {"train": RECORDS, **records}
    values = {
        "model": {"path": pretrained.source},
        "method": {"name": "prefix", "length": 4},
        "data": {"input": "{sum}=", "target": "{total}", "batch_size": 4},
        "train": {"steps": 12, "checkpoint_every": 3},
        "decode": {"max_new_tokens": 4},
        "output_dir": str(output),
    }
    return run_config(
        config.parse(values, overrides),
        pretrained=pretrained,
        records={name: split for name, split in splits.items() if split is not None},
        console=console,
        quiet=console is None,
    )


def console() -> Console:
    """Returns a console whose output `shown` reads."""
    return Console(file=io.StringIO(), width=200)


def shown(console: Console) -> str:
    return console.file.getvalue()


class Killed(BaseException):
    """Simulates the end of the process."""


@contextlib.contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Kills the run inside the block once `step` was recorded."""
    on_metrics = RunConsole.on_metrics

    def until(self: RunConsole, done: int, *rest: Any) -> bool:
        stop = on_metrics(self, done, *rest)
        if done == step:
            raise Killed
        return stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunConsole, "on_metrics", until)
        try:
            yield
        except Killed:
            return
    pytest.fail(f"the run ended before step {step}")


def losses(directory: Path, kind: str = "train") -> dict[int, float]:
    """Returns the loss of each step, from the metrics of a run."""
    return {line["step"]: line["loss"] for line in metrics(directory) if line["kind"] == kind}


def metrics(directory: Path) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl`, without times."""
    clocks = {"time", "seconds", "tokens_per_second"}
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in clocks}
        for line in lines
    ]


def bits(tree: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Returns every array of a tree in a form that compares all bits."""
    return {
        jax.tree_util.keystr(path): (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def state(directory: Path, step: int) -> dict[str, Any]:
    """Reads the arrays of a checkpoint with plain Orbax."""
    path = directory / "checkpoints" / str(step)
    # Whatever the sharding of the saved arrays.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        ocp.metadata(path).metadata,
    )
    return bits(ocp.load(path, like))


def outcome(directory: Path) -> dict[str, Any]:
    """Returns all outputs of a finished run, without times and paths."""
    steps = [int(path.name) for path in (directory / "checkpoints").iterdir()]
    outputs = {
        "metrics": metrics(directory),
        "checkpoints": sorted(steps),
        "state": state(directory, max(steps)),
    }
    if (directory / "prefix").exists():
        produced, card = artifact.load(directory)
        outputs |= {"prefix": bits(produced), "steps": card.steps, "results": card.metrics}
    for name in ("results.json", "predictions.jsonl", "predictions-before.jsonl"):
        if (directory / name).exists():
            outputs[name] = (directory / name).read_text()
    return outputs
