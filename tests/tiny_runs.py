"""Training runs small enough for a test, and what they leave."""

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
from prefix_jax.runs.console import Report
from prefix_jax.runs.run import Run, fit

# All of one length, so that a run compiles its step once.
RECORDS = [{"sum": f"{i}+{j}", "total": f"{i + j:02d}"} for i in range(4) for j in range(5)]
# What is measured: some that are learnt, for a random model cannot generalise.
SOME = RECORDS[6:10]


def on_one_device(model: Path) -> Pretrained:
    """Loads a model where a step costs least, however many devices the tests have."""
    return load(model, mesh=make_mesh(1, 1, 1, devices=jax.devices()[:1]))


def run(
    pretrained: Pretrained, output: Path, *overrides: str, console: Console | None = None, **records
) -> Run:
    """Trains twelve steps, unless overrides or records say otherwise.

    Args:
        pretrained: the backbone.
        output: the run directory.
        overrides: of the config.
        console: where progress is shown; None is nowhere.
        records: examples by split; None leaves a split to the config.
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
    return fit(
        config.parse(values, overrides),
        pretrained=pretrained,
        records={name: split for name, split in splits.items() if split is not None},
        console=console,
        quiet=console is None,
    )


def console() -> Console:
    """Collects what is shown, as a log would; `shown` reads it."""
    return Console(file=io.StringIO(), width=200)


def shown(console: Console) -> str:
    return console.file.getvalue()


class Killed(BaseException):
    """Stands for the end of the process."""


@contextlib.contextmanager
def killed_at(step: int) -> Iterator[None]:
    """The run inside ends once `step` is recorded, as if by a power cut."""
    record = Report.step

    def until(self: Report, done: int, *rest: Any) -> None:
        record(self, done, *rest)
        if done == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Report, "step", until)
        try:
            yield
        except Killed:
            return
    pytest.fail(f"the run ended before step {step}")


def losses(directory: Path, kind: str = "train") -> dict[int, float]:
    """Loss by step, from the run's metrics."""
    return {line["step"]: line["loss"] for line in metrics(directory) if line["kind"] == kind}


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without what tells the time."""
    clocks = {"time", "seconds", "tokens_per_second"}
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in clocks}
        for line in lines
    ]


def bits(tree: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every array of a tree, comparable to the last bit."""
    return {
        jax.tree_util.keystr(path): (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def state(directory: Path, step: int) -> dict[str, Any]:
    """The arrays of a checkpoint, read by plain Orbax."""
    path = directory / "checkpoints" / str(step)
    # Wherever the arrays lay that were saved.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        ocp.metadata(path).metadata,
    )
    return bits(ocp.load(path, like))


def outcome(directory: Path) -> dict[str, Any]:
    """All that a finished run leaves, but for what tells the time and where it lies."""
    steps = [int(path.name) for path in (directory / "checkpoints").iterdir()]
    found = {
        "metrics": metrics(directory),
        "checkpoints": sorted(steps),
        "state": state(directory, max(steps)),
    }
    if (directory / "prefix").exists():
        produced, card = artifact.load(directory)
        found |= {"prefix": bits(produced), "steps": card.steps, "results": card.metrics}
    for name in ("results.json", "predictions.jsonl", "predictions-before.jsonl"):
        if (directory / name).exists():
            found[name] = (directory / name).read_text()
    return found
