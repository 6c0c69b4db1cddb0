"""Tasks: what a model is asked to do, one file per kind.

To add one, write a file and a line in `TASKS`; CONTRIBUTING.md describes the steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefix_jax.config import DataConfig, EvaluateConfig, TaskConfig
from prefix_jax.config.task import TaskName
from prefix_jax.errors import ConfigError, DataError, PrefixError
from prefix_jax.nn.head import Head
from prefix_jax.tasks.base import EncoderDecoder, Prediction, Prompt, Reader, Task
from prefix_jax.tasks.chat import ChatTask
from prefix_jax.tasks.choice import MultipleChoice
from prefix_jax.tasks.classify import Classify
from prefix_jax.tasks.metrics import unknown_metric
from prefix_jax.tasks.rank import Rank
from prefix_jax.tasks.regress import Regress
from prefix_jax.tasks.span import ExtractSpan
from prefix_jax.tasks.tag import Tag
from prefix_jax.tasks.text import TextTask
from prefix_jax.validation import build

if TYPE_CHECKING:
    from prefix_jax.backbones.architecture import Architecture
    from prefix_jax.methods.base import Method

__all__ = [
    "GENERATE",
    "NAMES",
    "TASKS",
    "ChatTask",
    "Classify",
    "EncoderDecoder",
    "ExtractSpan",
    "MultipleChoice",
    "Prediction",
    "Prompt",
    "Rank",
    "Reader",
    "Regress",
    "Tag",
    "Task",
    "TextTask",
    "check_head",
    "check_metrics",
    "check_task",
    "from_card",
    "make_task",
    "name_of",
    "sections_of",
    "to_card",
]

# Tasks by their names in stored prefixes. In configs, "generate" is "text" or "chat".
TASKS: dict[str, type[Task]] = {
    "text": TextTask,
    "chat": ChatTask,
    "classify": Classify,
    "regress": Regress,
    "tag": Tag,
    "span": ExtractSpan,
    "choice": MultipleChoice,
    "rank": Rank,
}
NAMES = {cls: name for name, cls in TASKS.items()}
GENERATE: TaskName = "generate"
_GENERATING = ("text", "chat")


def name_of(task: Task) -> str:
    """Returns the name under which a task is registered.

    Raises:
        ConfigError: it is not registered.
    """
    if type(task) not in NAMES:
        raise ConfigError(
            f"the task {type(task).__name__} is not registered in prefix_jax.tasks.TASKS; add it "
            "there, under the name that configs and stored prefixes use"
        )
    return NAMES[type(task)]


def make_task(data: DataConfig, task: TaskConfig) -> Task:
    """Builds the task that two sections of a config describe.

    Args:
        data: templates and the length limit.
        task: the name of the task and its other fields.

    Raises:
        ConfigError: a field is set that the task does not have.
        DataError: a template is malformed.
    """
    name: str = task.name
    if name == GENERATE:
        name = "chat" if data.messages is not None else "text"
    cls = TASKS[name]
    fields = {field.name for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for section, config in (("data", data), ("task", task)):
        for field in dataclasses.fields(config):
            value, of_a_task = getattr(config, field.name), _is_task_field(field.name)
            if field.name in fields and (value is not None or field.name not in values):
                values[field.name] = value
            elif of_a_task and field.name not in fields and value != field.default:
                raise ConfigError(
                    f"{section}.{field.name} has no meaning for task.name {task.name}"
                    f"{' with data.messages' if name == 'chat' else ''}, which uses "
                    f"{', '.join(sorted(fields))}; leave it out"
                )
    return cls(**values)


def _is_task_field(name: str) -> bool:
    """Returns whether any task has this field."""
    return any(name == field.name for cls in TASKS.values() for field in dataclasses.fields(cls))


def sections_of(task: Task) -> dict[str, dict[str, Any]]:
    """Returns the `data` and `task` sections of a config for a task: the inverse of `make_task`.

    Raises:
        ConfigError: the task is not registered.
    """
    values = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    of_data = {field.name for field in dataclasses.fields(DataConfig)}
    return {
        "data": {field: value for field, value in values.items() if field in of_data},
        "task": {field: value for field, value in values.items() if field not in of_data}
        | {"name": _config_name(task)},
    }


def to_card(task: Task) -> dict[str, Any]:
    """Returns a task as the card of a prefix stores it: its name and all of its fields."""
    return {"name": name_of(task), **dataclasses.asdict(task)}


def from_card(stored: Mapping[str, Any]) -> Task:
    """Restores a task from the card of a prefix.

    Raises:
        PrefixError: it has an unknown name or a wrong field.
    """
    fields = dict(stored)
    name = fields.pop("name", None)
    if name not in TASKS:
        raise PrefixError(
            f"prefix.json: task.name is {name!r}, expected one of {', '.join(TASKS)}; the card is "
            "damaged, or of a newer version"
        )
    try:
        return build(TASKS[name], fields, "task")
    except (ConfigError, DataError) as error:
        raise PrefixError(f"prefix.json: {error}; the card is damaged") from error


def check_task(
    task: Task,
    architecture: Architecture,
    method: Method[Any] | None,
    evaluate: EvaluateConfig,
    head_learning_rate: float | None = None,
) -> None:
    """Checks that a task fits a run, before any weights are loaded.

    Args:
        task: the task.
        architecture: the model's.
        method: the tuning method; None for full fine-tuning.
        evaluate: the settings of the evaluation.
        head_learning_rate: the learning rate of the head; None for the default.

    Raises:
        ConfigError: it does not.
    """
    task.check(architecture, method)
    check_metrics(task, evaluate)
    if head_learning_rate is not None and task.head(architecture) is None:
        raise ConfigError(
            "optim.head_learning_rate: there is no head; remove it, or choose a task with a "
            "head (task.name)"
        )


def check_head(task: Task, head: Head | None, architecture: Architecture) -> None:
    """Checks that a stored head is the one that its task has on a model.

    Raises:
        PrefixError: it is another.
    """
    expected = task.head(architecture)
    # Dropout has no effect on stored weights.
    if head is not None and expected is not None:
        head = dataclasses.replace(head, dropout=expected.dropout)
    if head != expected:
        raise PrefixError(
            f"prefix.json: the task {name_of(task)} needs {expected or 'no head'}, got "
            f"{head or 'no head'}; the card is damaged, or the backbone has another kind of head"
        )


def check_metrics(task: Task, settings: EvaluateConfig) -> None:
    """Checks that the settings of an evaluation fit a task.

    Raises:
        ConfigError: the task does not have a metric; or labels or a baseline do not fit.
    """
    reads = {name: metric.reads for name, metric in task.metrics.items()}
    for name in settings.metrics:
        if name not in reads:
            raise ConfigError(
                f"evaluate.metrics: task.name {_config_name(task)}: {unknown_metric(name, reads)}"
            )
        if reads[name] == "label" and len(settings.labels or ()) < 2:
            raise ConfigError(
                f"evaluate.metrics: {name} chooses among texts; name at least two as "
                "evaluate.labels (--labels)"
            )
    if settings.labels is not None and "label" not in reads.values():
        raise ConfigError(
            "evaluate.labels are the texts among which a language model chooses; the labels of a "
            "task with a head are task.labels"
        )
    if settings.compare_baseline and "head" in reads.values():
        raise ConfigError(
            "evaluate.compare_baseline measures the bare language model: a task has no head before "
            "training"
        )


def _config_name(task: Task) -> str:
    """Returns the name of a task in configs."""
    name = name_of(task)
    return GENERATE if name in _GENERATING else name
