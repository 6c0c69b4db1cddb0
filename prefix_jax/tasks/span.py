"""Extractive question answering: the span of a text that answers a question."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import jax
import numpy as np

from prefix_jax.data.batch import Batch, Example, Examples, Window
from prefix_jax.data.source import Record, shown
from prefix_jax.errors import DataError
from prefix_jax.nn.head import Head
from prefix_jax.nn.loss import candidate_losses
from prefix_jax.tasks import metrics as scorers
from prefix_jax.tasks.base import Prediction, Reader
from prefix_jax.tasks.heads import (
    HeadTask,
    predict,
    require_template,
    template_of,
    truncating,
)
from prefix_jax.tasks.metrics import Metric, head_metrics
from prefix_jax.tasks.prepare import fields_needed
from prefix_jax.tasks.template import Template
from prefix_jax.untrusted.tokenizer import encodings, token_ids
from prefix_jax.validation import Interval, Size

if TYPE_CHECKING:
    from tokenizers import Encoding

    from prefix_jax.backbones.architecture import Architecture
    from prefix_jax.methods.base import Method

# Maximum number of span starts and ends to pair, as in the question-answering example of
# transformers.
_BEST = 20


@dataclasses.dataclass(frozen=True)
class ExtractSpan(HeadTask):
    """Finds the answer to a question in a text.

    The head scores every token as the start and as the end of the answer. A long text becomes
    several overlapping windows. In a window without the answer, both are the first token, which
    also stands for "no answer". The answers of a record are in SQuAD's format,
    {"text": […], "answer_start": […]}.

    Attributes:
        input: the template of the question.
        pair: the template of the text to search.
        stride: the number of tokens that successive windows share.
        answer_tokens: maximum tokens of an answer.
        unanswerable: whether a question may have no answer (SQuAD 2.0).
    """

    input: str | None = None
    pair: str | None = None
    stride: Annotated[int, Interval(ge=0, le=2**24)] = dataclasses.field(default=128, kw_only=True)
    answer_tokens: Size = dataclasses.field(default=30, kw_only=True)
    unanswerable: bool = dataclasses.field(default=False, kw_only=True)

    template_fields: ClassVar[tuple[str, ...]] = ("input", "pair")
    candidates: ClassVar[bool] = True
    dense: ClassVar[bool] = True

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return head_metrics(exact_match=scorers.squad_exact_match, f1=scorers.squad_f1)

    @property
    def form(self) -> tuple[str, ...] | None:
        names = (name for text in self.templates.values() for name in Template(text).fields)
        return fields_needed(names, self.prepare) if len(self.templates) == 2 else None

    def check(self, architecture: Architecture, method: Method[Any] | None) -> None:
        super().check(architecture, method)
        require_template(self.input, "input")
        require_template(self.pair, "pair")

    def head(self, architecture: Architecture) -> Head:
        """Two logits: of the start and of the end."""
        return Head(2)

    def examples(self, records: Sequence[Record], reader: Reader, answers: bool = True) -> Examples:
        """One example per window."""
        records = self.prepared(records)
        question, context = template_of(self.input, "input"), template_of(self.pair, "pair")
        questions = [question.render_one(record) for record in records]
        contexts = [context.render_one(record) for record in records]
        asked = token_ids(reader.tokenizer, questions, [record.origin for record in records])
        examples = []
        for number, record in enumerate(records):
            windows = self._windows(
                record, questions[number], contexts[number], len(asked[number]), reader
            )
            correct = answers_of(record, self.label, contexts[number]) if answers else []
            if answers and not correct and not self.unanswerable:
                raise DataError(
                    f"{record.origin}: the question has no answer; remove the record, or set "
                    "task.unanswerable=true to allow unanswerable questions (SQuAD 2.0)"
                )
            references = tuple(dict.fromkeys(text for text, _ in correct)) or ("",)
            for encoding in windows:
                window = Window(number, contexts[number], _context_offsets(encoding))
                start, end = _span(window.offset_T2, correct)
                label_T = np.zeros(len(encoding.ids), np.int32)
                label_T[start] |= 1
                label_T[end] |= 2
                examples.append(
                    self.example(
                        record,
                        [encoding],
                        np.arange(len(label_T)),
                        label_T,
                        reader,
                        window=window,
                        prompt=f"{questions[number]}\n{contexts[number]}",
                        references=references if answers else (),
                    )
                )
        return Examples(examples)

    def _windows(
        self, record: Record, question: str, context: str, asked: int, reader: Reader
    ) -> list[Encoding]:
        """Tokenises a question with every window of a text.

        Args:
            record: the record, for messages.
            question, context: its texts.
            asked: the number of tokens of the question.
            reader: how the model reads text.
        """
        limit = self.limit(reader)
        special = reader.tokenizer.num_special_tokens_to_add(pair=True)
        if limit is not None and asked + special + self.stride >= limit:
            raise DataError(
                f"{record.origin}: a question of {asked} tokens and task.stride {self.stride} "
                f"leave no room for the text within max_length {limit}; raise data.max_length or "
                "lower task.stride"
            )
        with truncating(reader.tokenizer, "right"):
            return encodings(
                reader.tokenizer,
                [question],
                [context],
                record.origin,
                truncation="only_second" if limit is not None else False,
                max_length=limit,
                stride=self.stride,
                return_overflowing_tokens=True,
            )

    def losses(self, out_BMY: jax.Array, batch: Batch) -> jax.Array:
        """Cross-entropy over the tokens, averaged over start and end."""
        assert batch.question_BM is not None  # as the examples are candidates
        return candidate_losses(out_BMY, batch.label_BM, batch.weight_BM, batch.question_BM)

    def predictions(
        self, examples: Sequence[Example], outputs: Sequence[np.ndarray]
    ) -> list[Prediction]:
        """One prediction per question, from all of its windows."""
        windows: dict[int, list[tuple[Example, np.ndarray]]] = {}
        for example, out_T2 in zip(examples, outputs, strict=True):
            assert example.window is not None
            windows.setdefault(example.window.question, []).append((example, out_T2))
        predictions = []
        for of_question in windows.values():
            score, text = max(
                (self._best_span(example, out_T2) for example, out_T2 in of_question),
                key=lambda pair: pair[0],
            )
            # The score of "no answer" is the minimum over the windows.
            nothing = min(float(out_T2[0].sum()) for _, out_T2 in of_question)
            if self.unanswerable and nothing > score:
                text = ""
            example = of_question[0][0]
            scores = {"span": score, "none": nothing}
            predictions.append(predict(example, text, text, example.references, scores))
        return predictions

    def _best_span(self, example: Example, out_T2: np.ndarray) -> tuple[float, str]:
        """Returns the best span of a window with its score, the sum of start and end logits."""
        window = example.window
        assert window is not None
        inside = np.flatnonzero(window.offset_T2[:, 0] >= 0)
        starts, ends = (
            inside[np.argsort(-out_T2[inside, i], kind="stable")[:_BEST]] for i in (0, 1)
        )
        spans = [
            (float(out_T2[start, 0] + out_T2[end, 1]), int(start), int(end))
            for start in starts
            for end in ends
            if start <= end < start + self.answer_tokens
        ]
        if not spans:
            return -np.inf, ""
        score, start, end = max(spans, key=lambda span: span[0])
        return score, window.context[window.offset_T2[start, 0] : window.offset_T2[end, 1]]


def answers_of(record: Record, name: str, context: str) -> list[tuple[str, int]]:
    """Returns the answers as pairs of text and start, in characters of the context.

    A question without an answer has an empty list, or one empty answer.
    """
    value = record.value(name)
    if isinstance(value, Mapping) and all(
        isinstance(value.get(key, []), list) for key in ("text", "answer_start")
    ):
        texts, starts = value.get("text", []), value.get("answer_start", [])
        if len(texts) != len(starts):
            raise DataError(
                f"{record.origin}: field {name!r} has {len(texts)} text and {len(starts)} "
                "answer_start entries; every answer needs both"
            )
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        pairs = [(item.get("text"), item.get("answer_start")) for item in value]
    else:
        raise DataError(
            f"{record.origin}: field {name!r} must have answers in SQuAD's format, "
            '{"text": […], "answer_start": […]}'
        )
    for text, start in pairs:
        if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
            raise DataError(f"{record.origin}: every answer needs a text and an answer_start")
        if not text:
            if len(pairs) > 1:
                raise DataError(f"{record.origin}: one of {len(pairs)} answers is empty")
            return []
        if start < 0 or context[start : start + len(text)] != text:
            there = context[start : start + len(text)] if start >= 0 else ""
            raise DataError(
                f"{record.origin}: expected the answer {shown(text)} at character {start}, got "
                f"{shown(there)}; offsets count characters of the rendered data.pair from 0"
            )
    return pairs


def _context_offsets(encoding: Encoding) -> np.ndarray:
    """Returns each token's start and end in the context, in characters; -1 outside the context."""
    inside = [sequence == 1 for sequence in encoding.sequence_ids]
    return np.where(np.array(inside)[:, None], np.array(encoding.offsets), -1).astype(np.int32)


def _span(offset_T2: np.ndarray, answers: Sequence[tuple[str, int]]) -> tuple[int, int]:
    """Returns the columns of the first answer's first and last token.

    Returns (0, 0) if the window does not contain the answer.
    """
    if not answers or not answers[0][0]:
        return 0, 0
    text, begin = answers[0]
    end = begin + len(text)
    inside = np.flatnonzero(offset_T2[:, 0] >= 0)
    if not len(inside) or offset_T2[inside[0], 0] > begin or offset_T2[inside[-1], 1] < end:
        return 0, 0
    # The last token that starts at or before the answer, and the first that ends at or after it.
    start = inside[np.flatnonzero(offset_T2[inside, 0] <= begin)[-1]]
    stop = inside[np.flatnonzero(offset_T2[inside, 1] >= end)[0]]
    return int(start), int(stop)
