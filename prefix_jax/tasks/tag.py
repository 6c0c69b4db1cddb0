"""Tagging: a label for every word of a text, such as named entities."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax.data.batch import Batch, Example, Examples
from prefix_jax.data.source import Record
from prefix_jax.errors import ConfigError, DataError
from prefix_jax.nn.head import Head
from prefix_jax.nn.loss import token_losses
from prefix_jax.tasks import metrics as scorers
from prefix_jax.tasks.base import Prediction, Reader, Task
from prefix_jax.tasks.heads import HeadTask
from prefix_jax.tasks.labels import LabelEncoder, check_labels, collect_labels
from prefix_jax.tasks.metrics import Metric, head_metrics
from prefix_jax.validation import Fraction

if TYPE_CHECKING:
    from tokenizers import Encoding

    from prefix_jax.backbones.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Tag(HeadTask):
    """Predicts a tag for every word, from the word's first token.

    The tags of a record are a list with one label per word.

    Attributes:
        words: the field with the list of words.
        labels: the tag names, in order; None collects them from the training data, sorted.
        dropout: the dropout rate of the head's input in training.
    """

    words: str = "tokens"
    labels: tuple[str, ...] | None = dataclasses.field(default=None, kw_only=True)
    dropout: Fraction = dataclasses.field(default=0.1, kw_only=True)

    dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_labels(self.labels)
        if not all(label.strip() for label in self.labels or ()):
            raise ConfigError(
                "task.labels contains an empty tag, which has no meaning for F1; give it a name"
            )

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return head_metrics(accuracy=scorers.word_accuracy, f1=scorers.entity_f1)

    @property
    def form(self) -> tuple[str, ...]:
        return (self.words,)

    def filled(self, values: Sequence[str]) -> Mapping[str, Any]:
        """Splits a text at spaces."""
        (text,) = values
        return {self.words: text.split()}

    def of_texts(self, texts: Sequence[str]) -> tuple[Task, list[Mapping[str, Any]]]:
        task = dataclasses.replace(self, prepare=None)
        return task, [self.filled([text]) for text in texts]

    def head(self, architecture: Architecture) -> Head:
        """One logit per tag."""
        return Head(len(self.labels or ("", "")), dropout=self.dropout)

    def collect(self, records: Sequence[Record]) -> Tag:
        if self.labels is not None:
            return self
        tags = (
            (record, tag)
            for record in self.prepared(records)
            for tag in list_of(record, self.label)
        )
        return dataclasses.replace(self, labels=collect_labels(tags, self.label))

    def examples(self, records: Sequence[Record], reader: Reader, answers: bool = True) -> Examples:
        records, names = self.prepared(records), self.labels or ()
        encoder = LabelEncoder(names)
        words = [words_of(record, self.words) for record in records]
        examples, cut = [], []
        encoded = self.encode(reader, [" ".join(texts) for texts in words], None, records)
        for record, texts, encoding in zip(records, words, encoded, strict=True):
            columns, kept = _first_tokens(texts, encoding)
            if not kept:
                raise DataError(f"{record.origin}: the words have no tokens; remove the record")
            labels = [0] * len(texts)
            if answers:
                tags = list_of(record, self.label)
                if len(tags) != len(texts):
                    raise DataError(
                        f"{record.origin}: {len(tags)} tags in {self.label!r} for "
                        f"{len(texts)} words in {self.words!r}; every word needs one tag"
                    )
                # Tags of truncated words are checked too.
                labels = [encoder.index(record, self.label, tag) for tag in tags]
            labels = [labels[word] for word in kept]
            examples.append(
                self.example(
                    record,
                    [encoding],
                    columns,
                    labels,
                    reader,
                    references=tuple(names[label] for label in labels) if answers else (),
                    prompt=" ".join(texts[word] for word in kept),
                )
            )
            cut += [record.origin] * (len(kept) < len(texts))
        return Examples(examples, cut)

    def losses(self, out_BMY: jax.Array, batch: Batch) -> jax.Array:
        """Cross-entropy, summed over the words."""
        return jnp.sum(token_losses(out_BMY, batch.label_BM) * batch.weight_BM, axis=1)

    def predictions(
        self, examples: Sequence[Example], outputs: Sequence[np.ndarray]
    ) -> list[Prediction]:
        names = self.labels or ()
        predictions = []
        for example, out_MY in zip(examples, outputs, strict=True):
            tags = [names[best] for best in out_MY.argmax(axis=1)]
            correct = list(example.references) or None
            references = () if correct is None else (" ".join(correct),)
            predictions.append(
                Prediction(
                    example.origin,
                    example.prompt,
                    " ".join(tags),
                    references,
                    value=tags,
                    target=correct,
                )
            )
        return predictions


def list_of(record: Record, name: str) -> list[Any]:
    """Returns the items of a field that holds a non-empty list."""
    value = record.value(name)
    if not isinstance(value, list):
        raise DataError(
            f"{record.origin}: field {name!r} must be a list with one item per word, got "
            f"{type(value).__name__}"
        )
    if not value:
        raise DataError(f"{record.origin}: field {name!r} is an empty list; remove the record")
    return value


def words_of(record: Record, name: str) -> list[str]:
    """Returns the words of a field as texts."""
    words = list_of(record, name)
    for word in words:
        if not isinstance(word, str | int | float):
            raise DataError(
                f"{record.origin}: words in field {name!r} must be texts or numbers, got "
                f"{type(word).__name__}"
            )
        if word != word:
            raise DataError(f"{record.origin}: field {name!r} contains NaN, expected a word")
    return [str(word) for word in words]


def _first_tokens(words: Sequence[str], encoding: Encoding) -> tuple[np.ndarray, list[int]]:
    """Returns the column of each word's first token, ascending, and the words that have one.

    The words were joined by spaces, and some tokenizers include the preceding space in a token.
    """
    spans = [
        (column, *span)
        for column, (span, special) in enumerate(
            zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        )
        if not special
    ]
    columns, kept = [], []
    begin = at = 0
    for number, word in enumerate(words):
        end = begin + len(word)
        while at < len(spans) and spans[at][2] <= begin:
            at += 1
        if at < len(spans) and spans[at][1] < end:
            columns.append(spans[at][0])
            kept.append(number)
        begin = end + 1
    return np.array(columns, np.int32), kept
