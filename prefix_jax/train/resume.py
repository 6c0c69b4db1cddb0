"""Whether a directory is free or holds the run that is to go on, and from where it goes on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefix_jax import config as configs
from prefix_jax.artifact import PREFIXES
from prefix_jax.config import Config
from prefix_jax.data.batch import Example
from prefix_jax.errors import CheckpointError, ConfigError
from prefix_jax.methods.multitask import PARTS
from prefix_jax.train.checkpoint import Checkpoints
from prefix_jax.train.loop import Progress
from prefix_jax.train.setup import Setup
from prefix_jax.train.step import TrainState

# What a run that goes on may be told otherwise than before. The rest decides its numbers.
_FREE = (
    "output",
    "mesh",
    "evaluate",
    "decode",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep",
    "train.log_every",
    "train.profile",
)

# What a run writes besides its config: none of it may be somebody else's.
_WRITTEN = (
    "checkpoints",
    "metrics.jsonl",
    "results.json",
    "predictions.jsonl",
    "predictions-before.jsonl",
    "loss.png",
    "prefix",
    PREFIXES,
    PARTS,
)


def refuse_another_run(directory: Path, config: Config) -> None:
    """Makes sure that a directory is free, or holds the run that is to go on.

    Raises:
        ConfigError: it holds another run.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"output {directory} is a file; choose a directory for the run")
    path = directory / "config.yaml"
    if not path.exists():
        if found := [name for name in _WRITTEN if (directory / name).exists()]:
            raise ConfigError(
                f"{directory} holds no run, and the run would replace {', '.join(found)} there; "
                "choose another output"
            )
        return
    if not (directory / "checkpoints").exists() and path.read_text() != configs.dump(config):
        raise ConfigError(
            f"the run would replace {path}, which is not of a run; choose another output"
        )
    before, now = _flat(dataclasses.asdict(configs.load(path))), _flat(dataclasses.asdict(config))
    differing = [
        f"{key} ({before.get(key)}, not {now.get(key)})"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in _FREE)
    ]
    if differing:
        raise ConfigError(
            f"{directory} holds a run with another {', '.join(differing)}; "
            "choose another output, or remove that directory to start anew"
        )


def _flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested sections by dotted keys. Of the metrics the first one is named: it selects."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{where}{name}"
        found |= _flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    if "evaluate.metrics" in found:
        found["first of evaluate.metrics"] = found["evaluate.metrics"][0]
    return found


def _digest(examples: Sequence[Example]) -> str:
    """Tells whether the examples are those that a run began with."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.ids_T).to_bytes(4, "little"))
        for array in (example.ids_T, example.index_M, example.label_M):
            digest.update(array.tobytes())
        if example.task is not None:
            digest.update(example.task.to_bytes(4, "little"))
        if example.source_ids_S is not None:
            digest.update(len(example.source_ids_S).to_bytes(4, "little"))
            digest.update(example.source_ids_S.tobytes())
    return digest.hexdigest()


def identity_of(setup: Setup) -> dict[str, str]:
    """What a run has to begin with again to go on: its checkpoints say it."""
    return {
        "fingerprint": setup.pretrained.fingerprint,
        "examples": _digest(setup.splits["train"]),
    }


def restore(
    setup: Setup, checkpoints: Checkpoints, identity: Mapping[str, str]
) -> tuple[TrainState, Progress]:
    """The latest state of an interrupted run, or the first one.

    Args:
        setup: of the run.
        checkpoints: what it has saved.
        identity: of `identity_of`.

    Raises:
        CheckpointError: it began with another backbone or other examples.
    """
    found = checkpoints.restore_latest(setup.state)
    if found is None:
        return setup.state, Progress()
    state, metadata = found
    for key, what in (("fingerprint", "another backbone"), ("examples", "other training examples")):
        if metadata[key] != identity[key]:
            raise CheckpointError(
                f"the run in {checkpoints.directory.parent} began with {what} "
                f"({key} {metadata[key][:12]}…, not {identity[key][:12]}…); "
                "choose another output, or put back what it began with"
            )
    return state, Progress(**metadata["progress"])
