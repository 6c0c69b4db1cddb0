"""What a run of a task with labels needs: its examples, its labels and its head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.config import Config, TaskConfig
from prefix_jax.data.fields import collect_labels
from prefix_jax.data.labelled import Reading
from prefix_jax.data.prepare import prepare
from prefix_jax.data.source import Record
from prefix_jax.data.tokens import Examples
from prefix_jax.errors import ConfigError
from prefix_jax.heads import Head, make_head
from prefix_jax.model import PrefixModel


def check_task(config: Config, arch: Architecture, source: str) -> None:
    """Raises ConfigError if the task is not one for the backbone that was read from `source`."""
    task, optim = config.task.name, config.optim
    if task == "generate":
        if not arch.causal:
            raise ConfigError(
                f"{source} is an encoder, which writes no text: give task.name, one of "
                "classify, regress, tag, span and choice"
            )
        if optim.head_learning_rate is not None:
            raise ConfigError("optim.head_learning_rate: there is no head; give task.name")
    elif arch.encoder is not None:
        raise ConfigError(
            f"task.name {task}: heads read an encoder or a decoder, and {source} is both; "
            "let it generate the label as text (task.name: generate)"
        )


def head_of(task: TaskConfig, arch: Architecture, labels: int) -> Head:
    """The head for a task of so many labels."""
    assert task.name != "generate"
    head = make_head(
        task.name,
        labels,
        model_type=arch.model_type,
        causal=arch.causal,
        pooler=arch.pooler,
        dropout=task.dropout,
    )
    return dataclasses.replace(head, soft=task.reads_soft)


def load_labelled_splits(
    config: Config,
    model: PrefixModel,
    pretrained: Pretrained,
    sources: Mapping[str, Sequence[Record]],
) -> tuple[TaskConfig, dict[str, Examples]]:
    """The examples of every split of a task with labels, and the task with its labels."""
    data, task = config.data, config.task
    model.check_context(data.max_length)
    if task.name == "choice" and not model.packs:
        raise ConfigError(
            "task.name choice reads several texts at a time, and soft tokens before an encoder "
            "take one: train keys and values instead (method.name: prefix)"
        )
    if task.reads_soft and model.packs:
        raise ConfigError(
            "task.reads_soft: no soft tokens stand before an encoder here, the first of which a "
            "head could read: leave it out, or train some (method.name: prompt)"
        )
    records = {name: prepare(read, data.prepare) for name, read in sources.items()}
    if task.name in ("classify", "tag") and task.labels is None:
        task = dataclasses.replace(task, labels=collect_labels(records["train"], task))
    arch = pretrained.backbone.arch
    reading = Reading(
        pretrained.tokenizer,
        task,
        data.input,
        data.pair,
        model.room if data.max_length is None else data.max_length,
        data.truncate,
        arch.causal,
        arch.token_types > 0,
    )
    return task, {name: reading.examples(found) for name, found in records.items()}
