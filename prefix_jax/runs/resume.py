"""Decides whether an output directory is free or holds a run to resume, and from which state."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefix_jax import config as configs
from prefix_jax.config import Config
from prefix_jax.data.batch import Example
from prefix_jax.errors import CheckpointError, ConfigError, RenamedKeyError
from prefix_jax.runs.build import Setup
from prefix_jax.runs.checkpoints import Checkpoints
from prefix_jax.runs.loop import Progress
from prefix_jax.runs.run_directory import CHECKPOINTS, CONFIG, WRITTEN, RunDirectory
from prefix_jax.train.step import TrainState
from prefix_jax.untrusted.paths import read_text

# What a run that goes on may be told otherwise than before. The rest decides its numbers.
_FREE = (
    "output_dir",
    "mesh",
    "evaluate",
    "decode",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.profile_steps",
)

# How long a run lasts: one that has ended can only be continued by a run of its own.
_LENGTH = {"train.steps", "train.epochs"}


def refuse_another_run(place: RunDirectory, config: Config) -> None:
    """Makes sure that a directory is free, or holds the run that is to go on.

    Raises:
        ConfigError: it holds another run, or files that the run would replace.
    """
    directory = place.directory
    inner = directory.resolve()
    for outer in inner.parents:
        if inner.relative_to(outer).parts[0] in WRITTEN and _holds_run(outer):
            raise ConfigError(
                f"output_dir {directory} is inside the run in {outer}, which replaces and deletes "
                "its own files; choose another output_dir"
            )
    path = directory / CONFIG
    if not os.path.lexists(path):
        found = [name for name in WRITTEN if os.path.lexists(directory / name)]
        if CHECKPOINTS not in found and place.has_checkpoints():
            found.append(CHECKPOINTS)
        if found:
            raise ConfigError(
                f"{directory} was not written by a run, and {', '.join(found)} in it would be "
                "replaced; choose another output_dir"
            )
        return
    try:
        if read_text(path, ConfigError) == configs.dump(config):
            return
        if not place.has_checkpoints():
            raise ConfigError(f"{path} was not written by a run and would be replaced")
        before = configs.load(path)
    except RenamedKeyError as error:
        raise ConfigError(
            f"{directory} holds a run of an older prefix_jax, whose {CONFIG} this version cannot "
            "resume; finish it with that version, or choose another output_dir (to start from its "
            f"stored prefix: init.start=prefix init.path={directory})"
        ) from error
    except ConfigError as error:
        raise ConfigError(
            f"{directory} does not hold a run to resume: {error}; choose another output_dir"
        ) from error
    old, new = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(config))
    differing = [
        key
        for key in {**old, **new}
        if old.get(key) != new.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in _FREE)
    ]
    if differing:
        named = ", ".join(f"{key} ({old.get(key)}, not {new.get(key)})" for key in differing)
        remedy = "choose another output_dir, or remove that directory to start from step 0"
        if _LENGTH.issuperset(differing) and (directory / "prefix").is_dir():
            remedy = (
                "to train its prefix further, choose another output_dir and start from the prefix: "
                f"init.start=prefix init.path={directory} output_dir=…"
            )
        raise ConfigError(f"{directory} holds a run with another {named}; {remedy}")


def _holds_run(directory: Path) -> bool:
    return (directory / CONFIG).is_file() and (directory / CHECKPOINTS).is_dir()


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
    if not {"progress", *identity} <= metadata.keys():
        raise CheckpointError(
            f"the checkpoints in {checkpoints.directory} were not written by prefix-jax train; "
            "choose another output_dir"
        )
    for key, what in (("fingerprint", "another backbone"), ("examples", "other training examples")):
        if metadata[key] != identity[key]:
            raise CheckpointError(
                f"the run in {checkpoints.directory.parent} began with {what} "
                f"({key} {metadata[key][:12]}…, not {identity[key][:12]}…); "
                "choose another output_dir, or put back what it began with"
            )
    return state, Progress(**metadata["progress"])
