"""Predicts answers for records using a stored prefix and its head."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prefix_jax.artifact import Card, TaskCard, TemplateCard
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.config import EvaluateConfig, TaskConfig
from prefix_jax.data.labelled import Reading
from prefix_jax.data.prepare import prepare
from prefix_jax.data.source import read_records
from prefix_jax.data.tokens import Examples
from prefix_jax.errors import ConfigError, PrefixError
from prefix_jax.evaluate.report import Prediction
from prefix_jax.evaluate.run import Evaluator
from prefix_jax.heads import Head
from prefix_jax.model import PrefixModel
from prefix_jax.prefix import Prefix
from prefix_jax.validation import build


@dataclasses.dataclass(frozen=True)
class Answerer:
    """A backbone with a prefix and a head, trained for a task with labels.

    Attributes:
        pretrained: the backbone.
        prefix: precedes every text; None runs the bare backbone.
        head: the weights of the head.
        card: the card of the prefix.
    """

    pretrained: Pretrained
    prefix: Prefix | None
    head: Mapping[str, Any] = dataclasses.field(repr=False)
    card: Card

    @property
    def task(self) -> TaskConfig:
        """The task with its labels, as in training.

        Raises:
            PrefixError: the card has no task, or the task does not match its head.
        """
        return self._task_and_head[0]

    @functools.cached_property
    def _task_and_head(self) -> tuple[TaskConfig, Head]:
        card = self._of_card
        try:
            task, head = build(TaskConfig, card.config), build(Head, card.head)
        except ConfigError as error:
            raise PrefixError(f"prefix.json: task: {error}; the card is damaged") from error
        labels = len(task.labels or ())
        outputs = {"classify": labels, "tag": labels, "span": 2}.get(task.name, 1)
        if (head.kind, head.outputs) != (task.name, outputs):
            raise PrefixError(
                f"prefix.json: task.config needs a head for {task.name} with {outputs} outputs, "
                f"got {head.kind} with {head.outputs} in task.head; the card is damaged"
            )
        return task, head

    @property
    def _of_card(self) -> TaskCard:
        if self.card.task is None:
            raise PrefixError(
                "this prefix has no head: it was trained to generate text; use generate"
            )
        return self.card.task

    def examples(
        self,
        data: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
        answered: bool = True,
        template: TemplateCard | None = None,
    ) -> Examples:
        """Reads records and turns them into examples as in training.

        Args:
            data: a file, `tfds:NAME/SPLIT`, or records.
            answered: whether the records have labels.
            template: None uses the template of the training data.

        Raises:
            DataError: a record cannot become an example.
        """
        template = template or self.card.template or TemplateCard()
        if template.input is None and self.task.name != "tag":
            raise PrefixError(
                "this prefix was stored without templates, so records cannot be rendered as text; "
                "import a PEFT adapter with data.input=…"
            )
        if template.pair is None and self.task.name == "span":
            raise PrefixError(
                "this prefix was stored without a template for the text to search; import a PEFT "
                "adapter with data.pair=…"
            )
        backbone = self.pretrained.backbone
        arch, room = backbone.arch, backbone.room(self.prefix, backbone.input_stack)
        reading = Reading(
            self.pretrained.tokenizer,
            self.task,
            template.input,
            template.pair,
            room if template.max_length is None else template.max_length,
            template.truncate,
            arch.causal,
            arch.token_types > 0,
        )
        return reading.examples(prepare(read_records(data), template.prepare), answered)

    def evaluator(self, settings: EvaluateConfig) -> Evaluator:
        """Returns an evaluator with these settings.

        Raises:
            ConfigError: a metric does not fit the task.
        """
        task, head = self._task_and_head
        return Evaluator(
            PrefixModel(self.pretrained.backbone, None, head),
            self.pretrained.tokenizer,
            self.pretrained.mesh,
            settings,
            task=task,
        )

    def predictions(self, examples: Examples, batch_size: int) -> Sequence[Prediction]:
        """Predicts answers in the order of the examples; for spans, one per question."""
        # Imported here because scikit-learn takes a second.
        from prefix_jax.evaluate.answers import read_answers

        evaluator = self.evaluator(EvaluateConfig(batch_size=batch_size))
        stacked = self.pretrained.stacked()
        outputs, _ = evaluator.outputs(stacked, self.head, self.prefix, examples)
        return [answer.prediction for answer in read_answers(self.task, examples, outputs)]
