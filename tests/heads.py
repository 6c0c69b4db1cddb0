"""Helpers for tests of tasks with a head."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from prefix_jax.data.batch import Example, Examples
from prefix_jax.data.source import read_records
from prefix_jax.evaluate.evaluator import score_predictions
from prefix_jax.tasks import Reader, Task


def read(tokenizer: Any, task: Task, *records: dict[str, Any], **fields: Any) -> Examples:
    """Reads examples for an encoder; `fields` change the task or the `Reader`."""
    options = {"room": 64, "causal": False, "token_types": True}
    options = {name: fields.pop(name, value) for name, value in options.items()}
    task = dataclasses.replace(task, **{"truncate": "right", **fields})
    return task.examples(read_records(records), Reader(tokenizer, **options))


def example(label: Any, *references: str, **fields: Any) -> Example:
    """Makes an example with a target in each of its first columns."""
    label_M = np.asarray(label)
    index_M = np.arange(len(label_M), dtype=np.int32)
    return Example(np.zeros(9, np.int32), index_M, label_M, "x", references, **fields)


def scores(task: Task, examples: list[Example], outputs: Any, *names: str) -> dict[str, Any]:
    """Scores outputs with these metrics, or all except the loss."""
    outputs = [np.array(out, np.float32) for out in outputs]
    predictions = task.predictions(examples, outputs)
    metrics = {name: metric.score for name, metric in task.metrics.items() if name != "loss"}
    return {
        name: pytest.approx(score_predictions(metrics[name], predictions).value, abs=0.01)
        for name in names or metrics
    }
