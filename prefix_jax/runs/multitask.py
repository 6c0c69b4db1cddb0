"""Multitask runs: assigning records to tasks and saving the shared factors."""

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


def assign_tasks(
    data: DataConfig, method: Method[Any] | None, sources: Mapping[str, Sequence[Record]]
) -> tuple[Method[Any] | None, Mapping[str, Sequence[Record]]]:
    """Gives the method the names of its tasks, and each record the index of its task.

    Without `data.task`, returns both unchanged.

    Raises:
        ConfigError: the method is not a multitask method, or a task has no training example.
        DataError: a record has no task, or an unknown one.
    """
    if data.task is None:
        if method is not None and method.task_names:
            raise ConfigError(
                "method.tasks names several tasks; set data.task to the field that names the task "
                "of a record"
            )
        return method, sources
    if not isinstance(method, MultitaskPromptTuning):
        raise ConfigError(
            "data.task trains one prefix per task, which only method.name: multitask supports; "
            "remove it to train one prefix for all"
        )
    names = collect_tasks(sources["train"], data.task)
    method = dataclasses.replace(method, tasks=method.tasks or names)
    if unused := [name for name in method.task_names if name not in names]:
        raise ConfigError(
            f"method.tasks: no training example has the task {unused[0]!r}; the tasks in field "
            f"{data.task!r} are {', '.join(names)}"
        )
    assigned = {
        split: with_tasks(records, data.task, method.task_names)
        for split, records in sources.items()
    }
    return method, assigned


def save_factors(directory: Path, params: Params) -> None:
    """Writes the factors of the tasks' prefixes, from which a second stage can start.

    Args:
        directory: the run directory.
        params: the parameters of the method.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = directory / PARTS
    try:
        path.write_bytes(safetensors.numpy.save(to_parts(params)))
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
