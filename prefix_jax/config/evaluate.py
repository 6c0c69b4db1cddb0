"""The `evaluate` section: metrics on held-out data."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from prefix_jax.config.task import TaskName
from prefix_jax.validation import PositiveInt, Size, check_conditions, check_fields, renamed

Metric = Literal[
    "loss",
    "accuracy",
    "bleu",
    "chrf",
    "rouge1",
    "rouge2",
    "rougeL",
    "rougeLsum",
    "exact_match",
    "final_number",
    "f1",
    "f1_macro",
    "matthews",
    "pearson",
    "spearman",
]

# Metrics of the tasks with labels.
METRICS_OF: dict[str, tuple[Metric, ...]] = {
    "classify": ("loss", "accuracy", "f1", "f1_macro", "matthews"),
    "regress": ("loss", "pearson", "spearman"),
    "tag": ("loss", "accuracy", "f1"),
    "span": ("loss", "exact_match", "f1"),
    "choice": ("loss", "accuracy"),
}
_LABELS_ONLY = ("f1", "f1_macro", "matthews", "pearson", "spearman")


@renamed(before="compare_baseline", limit="max_examples")
@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Metrics on held-out examples.

    Attributes:
        metrics: names of metrics. During training only the first is computed, and it selects the
            best checkpoint. For text: "loss" (per token, reported with its perplexity), "accuracy"
            (the most probable of `labels`), "bleu", "chrf", "rouge1", "rouge2", "rougeL",
            "rougeLsum", "exact_match" and "final_number". For labels: "loss", and depending on the
            task "accuracy", "f1" (of the second of two labels, otherwise the mean over labels; for
            tags over entities, for spans over words), "f1_macro", "matthews", "pearson",
            "spearman" and "exact_match".
        labels: for the accuracy of text generation, the answers to choose from.
        compare_baseline: also evaluate the model without the prefix on the test data.
        batch_size: examples per batch.
        max_examples: maximum number of examples, per task if there are several; None for all.
    """

    metrics: tuple[Metric, ...] = ("loss",)
    labels: tuple[str, ...] | None = None
    compare_baseline: bool = False
    batch_size: Size = 16
    max_examples: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_conditions((bool(self.metrics), "metrics is empty; name at least one"))


def check_metrics(task: TaskName, evaluate: EvaluateConfig) -> None:
    """Raises ConfigError if the metrics do not suit the task."""
    if task == "generate":
        wrong = [metric for metric in evaluate.metrics if metric in _LABELS_ONLY]
        available = [metric for metric in get_args(Metric) if metric not in _LABELS_ONLY]
        check_conditions(
            (
                not wrong,
                f"evaluate.metrics: {', '.join(wrong)} requires predicted labels, and task.name is "
                "generate; set task.name to a task with labels, such as classify, or use "
                f"{', '.join(available)}",
            ),
            (
                "accuracy" not in evaluate.metrics or len(evaluate.labels or ()) >= 2,
                "evaluate.metrics: accuracy requires at least two texts to choose from; set "
                "evaluate.labels (--labels)",
            ),
        )
        return
    available = list(METRICS_OF[task])
    wrong = [metric for metric in evaluate.metrics if metric not in available]
    check_conditions(
        (
            not wrong,
            f"evaluate.metrics: {', '.join(wrong)} cannot measure task.name {task}; "
            f"use {', '.join(available)}",
        ),
        (
            not evaluate.compare_baseline,
            "evaluate.compare_baseline requires task.name generate: other tasks have no head "
            "before training; leave it out",
        ),
        (
            evaluate.labels is None,
            f"evaluate.labels requires task.name generate, got {task}; set task.labels",
        ),
    )
