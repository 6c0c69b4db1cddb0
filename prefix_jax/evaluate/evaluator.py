"""Evaluates prefixes on held-out examples."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from jax.sharding import Mesh

from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.backbones.stacking import Params
from prefix_jax.config import DecodeConfig, EvaluateConfig
from prefix_jax.data.batch import Example
from prefix_jax.errors import DataError
from prefix_jax.evaluate.predictor import Predictor, Steered
from prefix_jax.evaluate.report import Report
from prefix_jax.model import PrefixModel
from prefix_jax.prefix import Prefix
from prefix_jax.tasks import Prediction, Reader, check_metrics
from prefix_jax.tasks.metrics import Score, Scorer

# The form of the backbone's weights that each pass is fastest with. The order is that of the
# passes: with the unstacked form last, the backbone is converted once.
_UNSTACKED = {"head": False, "likelihood": False, "label": False, "text": True}


def needs_references(metrics: Iterable[str]) -> bool:
    """Returns whether any metric compares predictions with references."""
    return not {*metrics} <= {"loss"}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation of one prefix.

    Attributes:
        report: metrics and signatures.
        predictions: one per input; empty if only a likelihood was measured.
        baseline: the evaluation of the bare model on the same examples, if it was measured.
    """

    report: Report
    predictions: Sequence[Prediction]
    baseline: Evaluation | None = None


class Evaluator:
    """Scores prefixes. Reuse one evaluator: it caches its compiled functions.

    Args:
        model: backbone, method and task.
        reader: how the model reads text.
        mesh: the mesh of the backbone's weights.
        config: metrics, labels, batch size and max_examples.
        decode: decoding options.

    Raises:
        ConfigError: a metric does not fit the task.
    """

    def __init__(
        self,
        model: PrefixModel,
        reader: Reader,
        mesh: Mesh,
        config: EvaluateConfig = EvaluateConfig(),
        decode: DecodeConfig = DecodeConfig(),
    ):
        check_metrics(model.task, config)
        self._task, self._config = model.task, config
        self._datasets = () if model.method is None else model.method.dataset_names
        self._predictor = Predictor(
            model,
            reader,
            mesh,
            decode=decode,
            labels=config.labels or (),
            batch_size=config.batch_size,
        )

    def compare(
        self,
        pretrained: Pretrained,
        prefixes: Mapping[str, Prefix | None],
        examples: Sequence[Example],
        phase: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext,
        head: Params | None = None,
    ) -> dict[str, Evaluation]:
        """Measures several prefixes on the same examples, using all metrics of the config.

        Metrics that need stacked weights come first, and those of generated text last: the backbone
        is converted once, and remains unstacked.

        Args:
            pretrained: the backbone.
            prefixes: prefixes by name; None is the bare model.
            examples: examples with references.
            phase: returns a context manager for a phase with this name, for progress displays.
            head: the weights of a task's head.
        """
        parts: dict[str, list[Evaluation]] = {name: [] for name in prefixes}
        for unstacked in (False, True):
            metrics = [
                name
                for name in self._config.metrics
                if _UNSTACKED[self._task.metrics[name].reads] == unstacked
            ]
            if not metrics:
                continue
            weights = pretrained.unstacked if unstacked else pretrained.stacked
            for name, prefix in prefixes.items():
                with phase(f"{', '.join(metrics)} {name}".rstrip()):
                    parts[name].append(self(weights(), prefix, examples, metrics, head))
        return {name: _merged(evaluations) for name, evaluations in parts.items()}

    def check(self, examples: Sequence[Example], metrics: Iterable[str]) -> None:
        """Checks that the texts to generate or choose fit the model, before a long run starts.

        Args:
            examples: the examples to measure.
            metrics: the metrics to use.

        Raises:
            ConfigError: none of `labels` is a target of the examples, or a text would be generated
                from an empty input.
            ContextError: prefix and prompt leave no room for `max_new_tokens`, or for a label.
        """
        examples = examples[: self._config.max_examples]
        if examples:
            for reads in self._reads(metrics):
                self._predictor.check(examples, reads)

    def __call__(
        self,
        params: Params,
        prefix: Prefix | None,
        examples: Sequence[Example],
        metrics: Iterable[str],
        head: Params | None = None,
    ) -> Evaluation:
        """Measures one prefix using the named metrics.

        With a mixture of datasets, the examples of each follow the dataset's own prefix: see
        `_over_datasets`.

        Args:
            params: the backbone's weights, stacked or unstacked (faster for generation).
            prefix: precedes every example; None runs the bare model.
            examples: examples with references.
            metrics: metric names, see `EvaluateConfig`.
            head: the weights of a task's head.
        """
        metrics = list(metrics)
        if not self._datasets:
            return self._measure(Steered(params, prefix, head), examples, metrics)
        prefixes = (None,) * len(self._datasets) if prefix is None else prefix.split_bank()
        evaluations = {}
        for index, (name, part) in enumerate(zip(self._datasets, prefixes, strict=True)):
            if own := [example for example in examples if example.dataset == index]:
                evaluations[name] = self._measure(Steered(params, part, head), own, metrics)
        return _over_datasets(evaluations)

    def _measure(
        self, model: Steered, examples: Sequence[Example], names: Sequence[str]
    ) -> Evaluation:
        """Measures one prefix, with one pass over the examples per kind of output."""
        examples = examples[: self._config.max_examples]
        values: dict[str, float] = {}
        signatures: dict[str, str] = {}
        predictions: list[Prediction] = []
        count = 0
        for reads in self._reads(names):
            result = self._predictor.passes[reads](model, examples)
            count = len(result.inputs)
            if "loss" in names and result.loss is not None:
                values["loss"] = result.loss
                if reads == "likelihood":
                    values["perplexity"] = _exp(result.loss)
            if result.outputs is None:
                continue
            predictions = self._task.predictions(result.inputs, result.outputs)
            count = len(predictions)
            for name in names:
                metric = self._task.metrics[name]
                if metric.reads == reads and metric.score is not None:
                    score = score_predictions(metric.score, predictions)
                    values[name], signatures[name] = score.value, score.signature
        return Evaluation(Report(values, signatures, count), predictions)

    def _reads(self, names: Iterable[str]) -> list[str]:
        """Returns the passes that these metrics read, in order."""
        wanted = {self._task.metrics[name].reads for name in names}
        return [reads for reads in _UNSTACKED if reads in wanted]


def score_predictions(scorer: Scorer, predictions: Sequence[Prediction]) -> Score:
    """Scores predictions.

    Raises:
        DataError: there are none, or a correct answer is unknown.
    """
    if not predictions or any(prediction.target is None for prediction in predictions):
        raise DataError("there is nothing to score: the examples have no labels")
    with warnings.catch_warnings():
        # If a label never occurs, or all values are equal, libraries warn and return 0 or NaN.
        warnings.simplefilter("ignore")
        return scorer(
            [prediction.value for prediction in predictions],
            [prediction.target for prediction in predictions],
        )


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def better(metric: str, value: float, than: float | None) -> bool:
    """Returns whether a value of `metric` is better: lower for a loss, higher for a score."""
    if than is None or math.isnan(than):
        return True
    return value < than if metric == "loss" else value > than


def _over_datasets(evaluations: Mapping[str, Evaluation]) -> Evaluation:
    """Merges the evaluations of a mixture: one "DATASET.METRIC" each, and means over datasets."""
    reports = {name: evaluation.report for name, evaluation in evaluations.items()}
    first = next(iter(reports.values()))
    metrics = {
        name: sum(report.metrics[name] for report in reports.values()) / len(reports)
        for name in first.metrics
    }
    metrics |= {
        f"{dataset}.{name}": value
        for dataset, report in reports.items()
        for name, value in report.metrics.items()
    }
    predictions = [
        prediction for evaluation in evaluations.values() for prediction in evaluation.predictions
    ]
    examples = sum(report.examples for report in reports.values())
    return Evaluation(Report(metrics, first.signatures, examples), predictions)


def _merged(parts: Sequence[Evaluation]) -> Evaluation:
    """Merges evaluations of one prefix on the same examples with different metrics."""
    metrics: dict[str, float] = {}
    signatures: Mapping[str, str] = {}
    for part in parts:
        metrics |= part.report.metrics
        signatures = {**signatures, **part.report.signatures}
    # Chosen labels come first; prefer generated texts, which are more informative.
    predictions = next((part.predictions for part in reversed(parts) if part.predictions), ())
    return Evaluation(Report(metrics, signatures, parts[0].report.examples), predictions)
