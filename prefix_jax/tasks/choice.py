"""Multiple choice: the best of several texts."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np

from prefix_jax.data.batch import Batch, Example, Examples
from prefix_jax.data.source import Record
from prefix_jax.errors import ConfigError
from prefix_jax.nn.head import Head
from prefix_jax.nn.loss import candidate_losses
from prefix_jax.tasks import metrics as scorers
from prefix_jax.tasks.base import Prediction, Reader
from prefix_jax.tasks.heads import (
    HeadTask,
    answer_column,
    predict,
    require_template,
    sequence_head,
    soft_tokens_precede_text,
    softmax,
    template_of,
)
from prefix_jax.tasks.labels import LabelEncoder, check_labels
from prefix_jax.tasks.metrics import Metric, head_metrics
from prefix_jax.tasks.template import Template
from prefix_jax.validation import Fraction

if TYPE_CHECKING:
    from prefix_jax.backbones.architecture import Architecture
    from prefix_jax.methods.base import Method


@dataclasses.dataclass(frozen=True)
class CandidatesTask(HeadTask):
    """A task that scores several texts, each paired with the same input.

    The texts of a record share a row without attending to each other.

    Attributes:
        input: the template of the input.
        choices: the templates of the texts. If a field is a list, each item becomes a text.
        dropout: the dropout rate of the head's input in training, for models whose head has
            dropout.
    """

    input: str | None = None
    choices: tuple[str, ...] | None = None
    dropout: Fraction = dataclasses.field(default=0.1, kw_only=True)

    template_fields: ClassVar[tuple[str, ...]] = ("input",)
    candidates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.choices or ():
            Template(text)

    def check(self, architecture: Architecture, method: Method[Any] | None) -> None:
        super().check(architecture, method)
        require_template(self.input, "input")
        if not self.choices:
            raise ConfigError(
                "task.choices: missing; give the templates of the texts to choose from, such as "
                "['{one}', '{two}']"
            )
        if soft_tokens_precede_text(architecture, method):
            raise ConfigError(
                "task.name: a task with several texts per example does not fit soft tokens before "
                "an encoder, which need a row for each text; train keys and values instead "
                "(method.name: prefix)"
            )

    def head(self, architecture: Architecture) -> Head:
        """One logit per text."""
        return sequence_head(architecture, 1, self.dropout, prefer_pooler=True)

    @abc.abstractmethod
    def targets(self, record: Record, texts: Sequence[str]) -> tuple[Sequence[float], str]:
        """Returns the target of each text, and the correct answer as a text."""

    def examples(self, records: Sequence[Record], reader: Reader, answers: bool = True) -> Examples:
        records = self.prepared(records)
        templates = [Template(text) for text in self.choices or ()]
        first = template_of(self.input, "input")
        inputs = [first.render_one(record) for record in records]
        texts = [
            [text for template in templates for text in template.render(record)]
            for record in records
        ]
        owners = [i for i, several in enumerate(texts) for _ in several]
        encoded = iter(
            self.encode(
                reader,
                [inputs[i] for i in owners],
                [text for several in texts for text in several],
                [records[i] for i in owners],
            )
        )
        examples, cut = [], []
        for record, given, several in zip(records, inputs, texts, strict=True):
            parts = [next(encoded) for _ in several]
            lengths = [len(part.ids) for part in parts]
            starts = np.cumsum([0, *lengths])[:-1]
            targets, best = self.targets(record, several) if answers else ([0] * len(parts), None)
            examples.append(
                self.example(
                    record,
                    parts,
                    [
                        s + answer_column(part, reader)
                        for s, part in zip(starts, parts, strict=True)
                    ],
                    targets,
                    reader,
                    part_T=np.repeat(np.arange(len(parts), dtype=np.int32), lengths),
                    choices=tuple(several),
                    references=() if best is None else (best,),
                    prompt=given,
                )
            )
            cut += [record.origin] * any(part.overflowing for part in parts)
        return Examples(examples, cut)


@dataclasses.dataclass(frozen=True)
class MultipleChoice(CandidatesTask):
    """Chooses the best of several texts.

    The correct answer of a record is the index of a text, counted from 0.

    Attributes:
        labels: the names of the choices; None uses their indices.
    """

    labels: tuple[str, ...] | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_labels(self.labels)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return head_metrics(accuracy=scorers.accuracy)

    def targets(self, record: Record, texts: Sequence[str]) -> tuple[Sequence[float], str]:
        """Returns 1 for the correct text and 0 for the others, and the correct text."""
        names = self.labels or tuple(map(str, range(len(texts))))
        encoder = LabelEncoder(names[: len(texts)], "choice")
        correct = encoder.index(record, self.label, record.value(self.label))
        return [int(i == correct) for i in range(len(texts))], texts[correct]

    def losses(self, out_BMY: jax.Array, batch: Batch) -> jax.Array:
        """Cross-entropy over the texts."""
        assert batch.question_BM is not None  # as the examples are candidates
        return candidate_losses(out_BMY, batch.label_BM, batch.weight_BM, batch.question_BM)

    def predictions(
        self, examples: Sequence[Example], outputs: Sequence[np.ndarray]
    ) -> list[Prediction]:
        """Scores are the probabilities of the texts."""
        predictions = []
        for example, out_MY in zip(examples, outputs, strict=True):
            probabilities = softmax(out_MY[:, 0])
            best = int(probabilities.argmax())
            scores = {str(i): float(p) for i, p in enumerate(probabilities)}
            correct = int(example.label_M.argmax())
            predictions.append(predict(example, example.choices[best], best, correct, scores))
        return predictions
