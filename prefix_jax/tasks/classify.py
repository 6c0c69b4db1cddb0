"""Classification of a text, or of a pair of texts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax.data.batch import Batch, Example
from prefix_jax.data.source import Record
from prefix_jax.nn.head import Head
from prefix_jax.nn.loss import token_losses
from prefix_jax.tasks import metrics as scorers
from prefix_jax.tasks.base import Prediction
from prefix_jax.tasks.heads import SequenceTask, predict, softmax
from prefix_jax.tasks.labels import LabelEncoder, check_labels, collect_labels
from prefix_jax.tasks.metrics import Metric, head_metrics

if TYPE_CHECKING:
    from prefix_jax.backbones.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Classify(SequenceTask):
    """Predicts the label of a text, or of a pair of texts.

    Attributes:
        labels: the label names, in order; None collects them from the training data, sorted.
    """

    labels: tuple[str, ...] | None = dataclasses.field(default=None, kw_only=True)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        labels = len(self.labels or ())
        return head_metrics(
            accuracy=scorers.accuracy,
            f1=functools.partial(scorers.f1, labels=labels),
            f1_macro=functools.partial(scorers.f1, labels=labels, average="macro"),
            matthews=scorers.matthews,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_labels(self.labels)

    def head(self, architecture: Architecture) -> Head:
        """One logit per label."""
        return self.head_of(architecture, len(self.labels or ("", "")))

    def collect(self, records: Sequence[Record]) -> Classify:
        if self.labels is not None:
            return self
        labels = ((record, record.value(self.label)) for record in self.prepared(records))
        return dataclasses.replace(self, labels=collect_labels(labels, self.label))

    def answer(self, record: Record) -> tuple[float, str]:
        names = self.labels or ()
        index = self._encoder.index(record, self.label, record.value(self.label))
        return index, names[index]

    @functools.cached_property
    def _encoder(self) -> LabelEncoder:
        assert self.labels is not None, "the labels are not collected yet"
        return LabelEncoder(self.labels)

    def losses(self, out_BMY: jax.Array, batch: Batch) -> jax.Array:
        """Cross-entropy."""
        return jnp.sum(token_losses(out_BMY, batch.label_BM) * batch.weight_BM, axis=1)

    def predictions(
        self, examples: Sequence[Example], outputs: Sequence[np.ndarray]
    ) -> list[Prediction]:
        """Scores are the probabilities of the labels."""
        names = self.labels or ()
        predictions = []
        for example, out_MY in zip(examples, outputs, strict=True):
            probabilities = softmax(out_MY[0])
            best = int(probabilities.argmax())
            scores = {name: float(p) for name, p in zip(names, probabilities, strict=True)}
            correct = int(example.label_M[0])
            predictions.append(predict(example, names[best], best, correct, scores))
        return predictions
