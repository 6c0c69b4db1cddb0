"""Evaluates prefixes on held-out examples."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.backbones.stacking import Params
from prefix_jax.config import DecodeConfig, EvaluateConfig, TaskConfig, check_metrics
from prefix_jax.data.batch import Batch, Example
from prefix_jax.data.ends import end_tokens
from prefix_jax.data.pipeline import evaluation_batches
from prefix_jax.data.tokens import group_references
from prefix_jax.decode.generate import Generator
from prefix_jax.errors import ConfigError, ContextError, NonFiniteError
from prefix_jax.evaluate.metrics import measure
from prefix_jax.evaluate.report import Prediction, Report
from prefix_jax.mesh import batch_shards, place_rows, replicated
from prefix_jax.model import PrefixModel, packs
from prefix_jax.prefix import Prefix
from prefix_jax.untrusted.tokenizer import token_ids

# Metrics that need no generated text.
LIKELIHOOD_METRICS = ("loss", "accuracy")


def needs_references(metrics: Iterable[str]) -> bool:
    """Returns whether any metric needs the acceptable targets in `data.references`."""
    return not {*metrics} <= {"loss"}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation of one prefix.

    Attributes:
        report: metrics and signatures.
        predictions: generated texts or chosen labels; empty if only the loss was measured.
    """

    report: Report
    predictions: Sequence[Prediction]


class Evaluator:
    """Scores prefixes. Reuse one evaluator: it caches its compiled functions.

    Args:
        model: backbone and method.
        tokenizer: the backbone's tokenizer.
        mesh: the mesh of the backbone's weights.
        config: metrics, labels, batch size and max_examples.
        decode: decoding options.
        task: the task, with its labels.
        ends: the tokens that end a generated text; None uses the defaults of `Generator`.

    Raises:
        ConfigError: a metric does not fit the task.
    """

    def __init__(
        self,
        model: PrefixModel,
        tokenizer: PreTrainedTokenizerFast,
        mesh: Mesh,
        config: EvaluateConfig = EvaluateConfig(),
        decode: DecodeConfig = DecodeConfig(),
        task: TaskConfig = TaskConfig(),
        ends: tuple[int, ...] | None = None,
    ):
        check_metrics(task.name, config)
        self._task = task
        self._model, self._tokenizer, self._mesh = model, tokenizer, mesh
        self._config, self._decode = config, decode
        self._ends = end_tokens(tokenizer, model.backbone.arch.end_ids) if ends is None else ends
        # Every host needs the scores of all rows.
        self._score = jax.jit(model.score, out_shardings=replicated(mesh))
        self._answer = jax.jit(model.head_outputs, out_shardings=replicated(mesh))

    def compare(
        self,
        pretrained: Pretrained,
        prefixes: Mapping[str, Prefix | None],
        examples: Sequence[Example],
        phase: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext,
        head: Params | None = None,
    ) -> dict[str, Evaluation]:
        """Measures several prefixes on the same examples, using all metrics of the config.

        Likelihoods come first, with stacked weights. Text generation follows, with unstacked
        weights: the backbone is converted once, and remains unstacked.

        Args:
            pretrained: the backbone.
            prefixes: prefixes by name; None is the bare model.
            examples: examples with references.
            phase: returns a context manager for a phase with this name, for progress displays.
            head: the weights of a task's head.
        """
        metrics = self._config.metrics
        if head is not None:
            found = {}
            for name, prefix in prefixes.items():
                with phase(f"{', '.join(metrics)} {name}".rstrip()):
                    found[name] = self(pretrained.stacked(), prefix, examples, metrics, head)
            return found
        parts: dict[str, list[Evaluation]] = {name: [] for name in prefixes}
        likelihoods = [metric for metric in metrics if metric in LIKELIHOOD_METRICS]
        written = [metric for metric in metrics if metric not in LIKELIHOOD_METRICS]
        for wanted, weights in ((likelihoods, pretrained.stacked), (written, pretrained.unstacked)):
            if not wanted:
                continue
            for name, prefix in prefixes.items():
                with phase(f"{', '.join(wanted)} {name}".rstrip()):
                    parts[name].append(self(weights(), prefix, examples, wanted))
        return {name: _merged(found) for name, found in parts.items()}

    def check(self, examples: Sequence[Example], metrics: Iterable[str]) -> None:
        """Checks that the texts to generate or choose fit the model, before a long run starts.

        Args:
            examples: the examples to measure.
            metrics: the metrics to use.

        Raises:
            ConfigError: none of `labels` is a target of the examples.
            ContextError: prefix and prompt leave no room for `max_new_tokens`, or for a label.
        """
        names = set(metrics)
        if not examples or self._task.name != "generate":
            return
        if "accuracy" in names:
            sides = self._model.encoder_decoder
            room = self._model.room if sides is None else sides.max_target
            self._candidates(examples[: self._config.max_examples], room)
        if names <= {*LIKELIHOOD_METRICS}:
            return
        longest = max(
            examples[: self._config.max_examples], key=lambda example: example.prompt_length
        )
        sides, new = self._model.encoder_decoder, self._decode.max_new_tokens
        # The input of an encoder was cut to fit, and its decoder holds only the generated text.
        room = self._model.room if sides is None else sides.max_target
        given = longest.prompt_length if sides is None else 0
        if given + new > room:
            positions = self._model.backbone.arch.max_positions
            raise ContextError(
                f"{longest.source}: {given} tokens of input and "
                f"decode.max_new_tokens {new} exceed the model's {positions} positions, of which "
                f"the prefix leaves {room}; lower decode.max_new_tokens or data.max_length"
            )

    def __call__(
        self,
        params: Params,
        prefix: Prefix | None,
        examples: Sequence[Example],
        metrics: Iterable[str],
        head: Params | None = None,
    ) -> Evaluation:
        """Measures one prefix using the named metrics.

        With a multitask method, the examples of each task follow the task's own prefix: see
        `_over_tasks`.

        Args:
            params: the backbone's weights, stacked or unstacked (faster for generation).
            prefix: precedes every example; None runs the bare model.
            examples: examples with references.
            metrics: metric names, see `EvaluateConfig`.
            head: the weights of a task's head.
        """
        metrics = list(metrics)
        tasks = () if self._model.method is None else self._model.method.task_names
        if not tasks:
            return self._measure(params, prefix, examples, metrics, head)
        prefixes = (None,) * len(tasks) if prefix is None else prefix.split_tasks()
        found = {}
        for number, (task, alone) in enumerate(zip(tasks, prefixes, strict=True)):
            if own := [example for example in examples if example.task == number]:
                found[task] = self._measure(params, alone, own, metrics, head)
        return _over_tasks(found)

    def _measure(
        self,
        params: Params,
        prefix: Prefix | None,
        examples: Sequence[Example],
        names: Sequence[str],
        head: Params | None,
    ) -> Evaluation:
        """Measures the prefix of one task."""
        examples = examples[: self._config.max_examples]
        if head is not None:
            return self._measure_answers(params, head, prefix, examples, names)
        values: dict[str, float] = {}
        signatures: dict[str, str] = {}
        predictions: list[Prediction] = []
        if "loss" in names:
            values["loss"] = self.loss(params, prefix, examples)
            values["perplexity"] = _exp(values["loss"])
        written = [name for name in names if name not in LIKELIHOOD_METRICS]
        inputs = group_references(examples)
        for wanted, predict in (
            (["accuracy"] if "accuracy" in names else [], self._choose),
            (written, self._generate),
        ):
            if not wanted:
                continue
            texts = predict(params, prefix, inputs)
            scores = measure(wanted, texts, [example.references for example in inputs])
            values |= {name: score.value for name, score in scores.items()}
            signatures |= {name: score.signature for name, score in scores.items()}
            predictions = [
                Prediction(example.source, example.prompt, text, tuple(example.references))
                for example, text in zip(inputs, texts, strict=True)
            ]
        return Evaluation(Report(values, signatures, len(inputs)), predictions)

    def _measure_answers(
        self,
        params: Params,
        head: Params,
        prefix: Prefix | None,
        examples: Sequence[Example],
        names: Sequence[str],
    ) -> Evaluation:
        # Imported here because scikit-learn takes a second.
        from prefix_jax.evaluate.answers import read_answers, score_answers

        outputs, loss = self.outputs(params, head, prefix, examples)
        answers = read_answers(self._task, examples, outputs)
        scores = score_answers(self._task, [name for name in names if name != "loss"], answers)
        values = {"loss": loss} if "loss" in names else {}
        values |= {name: score.value for name, score in scores.items()}
        signatures = {name: score.signature for name, score in scores.items()}
        predictions = [answer.prediction for answer in answers]
        return Evaluation(Report(values, signatures, len(answers)), predictions)

    def outputs(
        self, params: Params, head: Params, prefix: Prefix | None, examples: Sequence[Example]
    ) -> tuple[list[np.ndarray], float]:
        """Computes a head's output out_MY for every example, and its loss, averaged over targets.

        Args:
            params: the backbone's weights.
            head: the head's weights.
            prefix: precedes every example.
            examples: the inputs.

        Raises:
            NonFiniteError: an output is NaN or infinite.
        """
        outputs: list[np.ndarray] = []
        total = 0.0
        for batch in self._batches(examples, pack=False):
            with jax.set_mesh(self._mesh):
                placed = place_rows(batch, self._mesh)
                out_BMY, loss_B = jax.device_get(self._answer(params, head, prefix, placed))
            total += float(loss_B.sum())
            # A batch may end in padding rows, and a row in padding targets.
            some = examples[len(outputs) : len(outputs) + self._config.batch_size]
            for example, out_MY in zip(some, out_BMY, strict=False):
                outputs.append(out_MY[: len(example.index_M)])
                if not np.isfinite(outputs[-1]).all():
                    raise NonFiniteError.of(example.source, "the outputs of the head")
        return outputs, total / sum(example.targets for example in examples)

    def loss(self, params: Params, prefix: Prefix | None, examples: Sequence[Example]) -> float:
        """Computes the mean negative log-likelihood of the target tokens, in nats."""
        total = sum(
            float(self._scores(params, prefix, batch).sum())
            for batch in self._batches(examples, pack=packs(prefix))
        )
        # A batch has only this host's rows, but its scores cover the rows of all hosts.
        return total / sum(example.targets for example in examples)

    def _batches(self, examples: Sequence[Example], pack: bool) -> Iterable[Batch]:
        shards = batch_shards(self._mesh)
        part = (jax.process_index(), jax.process_count())
        return evaluation_batches(
            examples, self._config.batch_size, pack=pack, rows_multiple=shards, part=part
        )

    def _scores(self, params: Params, prefix: Prefix | None, batch: Batch) -> jax.Array:
        with jax.set_mesh(self._mesh):
            return self._score(params, prefix, place_rows(batch, self._mesh))

    def _choose(
        self, params: Params, prefix: Prefix | None, examples: Sequence[Example]
    ) -> list[str]:
        """Chooses the label with the largest summed log-probability for each example."""
        labels = self._config.labels or ()
        candidates = self._candidates(examples, self._model.backbone.room(prefix, "decoder"))
        rows = [
            np.asarray(self._scores(params, prefix, batch))
            for batch in self._batches(candidates, pack=False)
        ]
        # The last batch may end in padding rows.
        losses = np.concatenate(rows)[: len(candidates)].reshape(len(examples), len(labels))
        for example, losses_Y in zip(examples, losses, strict=True):
            if not np.isfinite(losses_Y).all():
                raise NonFiniteError.of(example.source, "the likelihoods of the labels")
        return [labels[best] for best in losses.argmin(axis=1)]

    def _candidates(self, examples: Sequence[Example], room: int) -> list[Example]:
        """Pairs every example with every label as its target.

        Args:
            examples: examples with references.
            room: tokens that fit after the prefix; in an encoder-decoder, tokens of a target.
        """
        labels = self._config.labels or ()
        targets = list(dict.fromkeys(text for example in examples for text in example.references))
        if not {*labels} & {*targets}:
            raise ConfigError(
                f"evaluate.labels: {', '.join(map(repr, labels))} do not occur as targets in the "
                f"data, such as {targets[0]!r}; write labels exactly like targets, including spaces"
            )
        ids = token_ids(self._tokenizer, labels, "evaluate.labels", ConfigError)
        candidates = [
            _with_target(example, [*label_ids, *self._end(example)])
            for example in examples
            for label_ids in ids
        ]
        longest = max(candidates, key=lambda candidate: len(candidate.ids_T))
        # The start token of a decoder does not count as part of a target.
        needed = len(longest.ids_T) - (longest.source_ids_S is not None)
        if needed > room:
            raise ContextError(
                f"{longest.source}: with the longest of evaluate.labels, {needed} tokens exceed "
                f"the {room} positions left by the prefix; lower data.max_length"
            )
        return candidates

    def _end(self, example: Example) -> list[int]:
        """Returns the token that ends the target; in a chat, the end of the assistant turn."""
        ids: list[int] = example.ids_T[np.isin(example.ids_T, self._ends)][-1:].tolist()
        return ids

    def _generate(
        self, params: Params, prefix: Prefix | None, examples: Sequence[Example]
    ) -> list[str]:
        """Generates a text for each example's prompt."""
        generator = Generator(self._model.backbone, params, self._tokenizer, prefix, self._ends)
        prompts = [example.prompt_ids for example in examples]
        generations = generator.generate(prompts, self._decode, batch_size=self._config.batch_size)
        return [generation.text.strip() for generation in generations]


def _with_target(example: Example, target: Sequence[int]) -> Example:
    """Replaces the target of an example by other tokens to score."""
    prompt = example.ids_T[: example.prompt_length]
    return Example.of_text(
        np.concatenate([prompt, np.asarray(target, np.int32)]),
        np.arange(len(prompt) + len(target)) >= max(len(prompt), 1),
        example.source,
        source_ids_S=example.source_ids_S,
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


def _over_tasks(found: Mapping[str, Evaluation]) -> Evaluation:
    """Merges the evaluations of several tasks: one "TASK.METRIC" each, and means over tasks."""
    reports = {task: evaluation.report for task, evaluation in found.items()}
    first = next(iter(reports.values()))
    metrics = {
        name: sum(report.metrics[name] for report in reports.values()) / len(reports)
        for name in first.metrics
    }
    metrics |= {
        f"{task}.{name}": value
        for task, report in reports.items()
        for name, value in report.metrics.items()
    }
    predictions = [made for evaluation in found.values() for made in evaluation.predictions]
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
