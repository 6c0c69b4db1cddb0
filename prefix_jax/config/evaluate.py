"""The `evaluate` section: metrics on held-out data."""

from __future__ import annotations

import dataclasses

from prefix_jax.validation import PositiveInt, Size, check_conditions, check_fields, renamed


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
            "spearman", "exact_match", "ndcg" and "mrr".
        labels: for the accuracy of text generation, the answers to choose from.
        compare_baseline: also evaluate the model without the prefix on the test data.
        batch_size: examples per batch.
        max_examples: maximum number of examples, per dataset if there are several; None for all.
    """

    metrics: tuple[str, ...] = ("loss",)
    labels: tuple[str, ...] | None = None
    compare_baseline: bool = False
    batch_size: Size = 16
    max_examples: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_conditions((bool(self.metrics), "metrics is empty; name at least one"))
