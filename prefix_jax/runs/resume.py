"""Decides whether an output directory is free or holds a run to resume, and from which state."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from prefix_jax import config as configs
from prefix_jax.config import Config
from prefix_jax.data.batch import Example
from prefix_jax.errors import CheckpointError, ConfigError, RenamedKeyError
from prefix_jax.runs.checkpoints import Checkpoints
from prefix_jax.runs.hooks import Progress
from prefix_jax.runs.run_directory import CHECKPOINTS, CONFIG, WRITTEN, RunDirectory
from prefix_jax.train.step import TrainState
from prefix_jax.untrusted.paths import read_text

# Settings that may change when a run resumes. All others determine its results.
_MAY_CHANGE = (
    "output_dir",
    "mesh",
    "evaluate",
    "decode",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.profile_steps",
    "train.speculative_ngrams",
)

# Settings of the length of a run. A run that has finished can only be continued by a new run.
_LENGTH = {"train.steps", "train.epochs"}


def refuse_another_run(output: RunDirectory, config: Config) -> None:
    """Checks that a directory is free, or holds a run of the same config. First process only.

    Raises:
        ConfigError: it holds another run, or files that the run would replace.
    """
    if jax.process_index() != 0:
        return
    directory = output.directory
    inner = directory.resolve()
    for outer in inner.parents:
        if inner.relative_to(outer).parts[0] in WRITTEN and _holds_run(outer):
            raise ConfigError(
                f"output_dir {directory} is inside the run in {outer}, which replaces and deletes "
                "its own files; choose another output_dir"
            )
    path = directory / CONFIG
    if not os.path.lexists(path):
        existing = [name for name in WRITTEN if os.path.lexists(directory / name)]
        if CHECKPOINTS not in existing and output.has_checkpoints():
            existing.append(CHECKPOINTS)
        if existing:
            raise ConfigError(
                f"{directory} was not written by a run, and {', '.join(existing)} in it would be "
                "replaced; choose another output_dir"
            )
        return
    try:
        if read_text(path, ConfigError) == configs.dump(config):
            return
        if not output.has_checkpoints():
            raise ConfigError(f"{path} was not written by a run and would be replaced")
        before = configs.load(path)
    except RenamedKeyError as error:
        remedy = "finish it with that version, or choose another output_dir"
        if (directory / "prefix").is_dir():
            remedy = (
                "choose another output_dir; to start from its stored prefix, add init.start=prefix "
                f"init.path={directory}"
            )
        raise ConfigError(
            f"{directory} holds a run of an older prefix_jax, whose {CONFIG} this version cannot "
            f"resume; {remedy}"
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
        and not any(key == free or key.startswith(f"{free}.") for free in _MAY_CHANGE)
    ]
    if differing:
        changes = ", ".join(f"{key} ({old.get(key)}, not {new.get(key)})" for key in differing)
        remedy = "choose another output_dir, or remove that directory to start from step 0"
        if _LENGTH.issuperset(differing) and (directory / "prefix").is_dir():
            remedy = (
                "to train its prefix further, choose another output_dir and start from the prefix: "
                f"init.start=prefix init.path={directory} output_dir=…"
            )
        raise ConfigError(f"{directory} holds a run with another {changes}; {remedy}")


def _holds_run(directory: Path) -> bool:
    return (directory / CONFIG).is_file() and (directory / CHECKPOINTS).is_dir()


def _flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Flattens sections to dotted keys, and adds the metric that selects the best step."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{where}{name}"
        flat |= _flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    if "evaluate.metrics" in flat:
        flat["first of evaluate.metrics"] = flat["evaluate.metrics"][0]
    return flat


@dataclasses.dataclass(frozen=True)
class Identity:
    """Inputs that must not change when a run resumes, stored in checkpoints.

    Attributes:
        fingerprint: of the backbone's weights.
        examples: digest of the training examples.
    """

    fingerprint: str
    examples: str

    @classmethod
    def of(cls, fingerprint: str, examples: Sequence[Example]) -> Identity:
        return cls(fingerprint, _digest(examples))


def resume(
    checkpoints: Checkpoints, initial: TrainState, identity: Identity
) -> tuple[TrainState, Progress]:
    """Restores the latest state of an interrupted run, or returns the initial one.

    Args:
        checkpoints: the checkpoints of the run.
        initial: the state before the first step.
        identity: of this run.

    Raises:
        CheckpointError: the run started with another backbone or other examples.
    """
    restored = checkpoints.restore_latest(initial)
    if restored is None:
        return initial, Progress()
    state, metadata = restored
    expected = dataclasses.asdict(identity)
    if not {"progress", *expected} <= metadata.keys():
        raise CheckpointError(
            f"the checkpoints in {checkpoints.directory} were not written by prefix-jax train; "
            "choose another output_dir"
        )
    for key, what in (("fingerprint", "another backbone"), ("examples", "other training examples")):
        if metadata[key] != expected[key]:
            raise CheckpointError(
                f"the run in {checkpoints.directory.parent} started with {what} "
                f"({key} {metadata[key][:12]}…, not {expected[key][:12]}…); "
                "choose another output_dir, or restore what it started with"
            )
    return state, Progress(**metadata["progress"])


def _digest(examples: Sequence[Example]) -> str:
    """SHA-256 of the tokens of all examples."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.ids_T).to_bytes(4, "little"))
        for array in (example.ids_T, example.index_M, example.label_M):
            digest.update(array.tobytes())
        if example.dataset is not None:
            digest.update(example.dataset.to_bytes(4, "little"))
        if example.source_ids_S is not None:
            digest.update(len(example.source_ids_S).to_bytes(4, "little"))
            digest.update(example.source_ids_S.tobytes())
    return digest.hexdigest()
