"""Ranking: texts ordered by a score, for rerankers and reward models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax.data.batch import Batch, Example
from prefix_jax.data.source import Record
from prefix_jax.errors import DataError
from prefix_jax.nn.loss import listwise_losses
from prefix_jax.tasks.base import Prediction
from prefix_jax.tasks.choice import CandidatesTask
from prefix_jax.tasks.heads import predict
from prefix_jax.tasks.metrics import Metric, Score, head_metrics
from prefix_jax.tasks.regress import number_of
from prefix_jax.validation import shown

_TOP = 10


@dataclasses.dataclass(frozen=True)
class Rank(CandidatesTask):
    """Scores several texts for the same input, so that better texts get higher scores.

    The head gives every text one number. The loss is the softmax cross-entropy of RankT5 (Zhuang et
    al. 2023): between the texts' relevances, normalised, and the softmax of their scores. For a
    preferred and a rejected text, relevances 1 and 0, it is that of a reward model (Bradley & Terry
    1952).

    The label of a record is the list of its texts' relevances, numbers from 0 (irrelevant), of
    which at least one is positive.
    """

    label_dtype: ClassVar[type[np.generic]] = np.float32

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return head_metrics(ndcg=ndcg, mrr=mrr)

    def targets(self, record: Record, texts: Sequence[str]) -> tuple[Sequence[float], str]:
        """Returns the relevance of each text, and the most relevant text."""
        values = record.value(self.label)
        if not isinstance(values, list) or len(values) != len(texts):
            raise DataError(
                f"{record.origin}: field {self.label!r} must be a list of {len(texts)} "
                f"relevances, one per text, got {shown(values)}"
            )
        relevances = [number_of(record, self.label, value) for value in values]
        if min(relevances) < 0 or max(relevances) == 0:
            raise DataError(
                f"{record.origin}: the relevances in field {self.label!r} must be at least 0, and "
                f"one of them positive, got {relevances}"
            )
        return relevances, texts[int(np.argmax(relevances))]

    def losses(self, out_BMY: jax.Array, batch: Batch) -> jax.Array:
        assert batch.question_BM is not None  # as the examples are candidates
        return listwise_losses(jnp.squeeze(out_BMY, -1), batch.label_BM, batch.question_BM)

    def predictions(
        self, examples: Sequence[Example], outputs: Sequence[np.ndarray]
    ) -> list[Prediction]:
        """The prediction is the best text; `scores` are those of all."""
        predictions = []
        for example, out_MY in zip(examples, outputs, strict=True):
            scores = [float(score) for score in out_MY[:, 0]]
            best = example.choices[int(np.argmax(scores))]
            named = {str(i): score for i, score in enumerate(scores)}
            relevances = [float(relevance) for relevance in example.label_M]
            predictions.append(predict(example, best, scores, relevances, named))
        return predictions


def ndcg(predicted: Sequence[Sequence[float]], correct: Sequence[Sequence[float]]) -> Score:
    """Computes NDCG@10 (Järvelin & Kekäläinen 2002) with gains 2**relevance - 1."""

    def gain(relevances: np.ndarray) -> float:
        top = relevances[:_TOP]
        return float(np.sum((2.0**top - 1) / np.log2(np.arange(len(top)) + 2)))

    values = []
    for scores, relevances in zip(predicted, correct, strict=True):
        in_order = np.array(relevances)[np.argsort(-np.array(scores), kind="stable")]
        values.append(gain(in_order) / gain(np.sort(np.array(relevances))[::-1]))
    return Score(100 * float(np.mean(values)), f"@{_TOP}|gain:exponential")


def mrr(predicted: Sequence[Sequence[float]], correct: Sequence[Sequence[float]]) -> Score:
    """Computes the mean reciprocal rank of the first relevant text."""
    values = []
    for scores, relevances in zip(predicted, correct, strict=True):
        in_order = np.array(relevances)[np.argsort(-np.array(scores), kind="stable")]
        values.append(1 / (1 + int(np.flatnonzero(in_order > 0)[0])))
    return Score(100 * float(np.mean(values)), "relevant:positive")
