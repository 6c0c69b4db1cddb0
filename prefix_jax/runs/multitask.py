"""What a run needs that trains several tasks together, each with a prefix of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.numpy

from prefix_jax.config import DataConfig
from prefix_jax.data.source import Record
from prefix_jax.data.tasks import collect_tasks, with_tasks
from prefix_jax.errors import CheckpointError, ConfigError
from prefix_jax.methods import Method, MultitaskPromptTuning
from prefix_jax.methods.base import Params
from prefix_jax.methods.multitask import PARTS, to_parts


def tell_tasks_apart(
    data: DataConfig, method: Method[Any] | None, sources: Mapping[str, Sequence[Record]]
) -> tuple[Method[Any] | None, Mapping[str, Sequence[Record]]]:
    """The method with the names of its tasks, and the records of each split with theirs.

    Where `data.task` names no field, both are as they were.

    Raises:
        ConfigError: the method has no tasks; or one of them has no training example.
        DataError: a record names no task, or an unknown one.
    """
    if data.task is None:
        if method is not None and method.task_names:
            raise ConfigError(
                "method.tasks names several tasks: say with data.task which field of a record "
                "names its own"
            )
        return method, sources
    if not isinstance(method, MultitaskPromptTuning):
        raise ConfigError(
            "data.task lets several tasks train together, each with a prefix of its own, which "
            "method.name: multitask does; leave it out for one prefix for all"
        )
    found = collect_tasks(sources["train"], data.task)
    method = dataclasses.replace(method, tasks=method.tasks or found)
    if idle := [name for name in method.task_names if name not in found]:
        raise ConfigError(
            f"no training example is of the task {idle[0]!r} in method.tasks; those in field "
            f"{data.task!r} are {', '.join(found)}"
        )
    split = {name: with_tasks(of, data.task, method.task_names) for name, of in sources.items()}
    return method, split


def save_parts(directory: Path, params: Params) -> None:
    """Writes what the prefixes of several tasks are made of: what a second stage starts from.

    Args:
        directory: of the run.
        params: of the method.

    Raises:
        CheckpointError: the disk does not take it.
    """
    path = directory / PARTS
    try:
        path.write_bytes(safetensors.numpy.save(to_parts(params)))
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
