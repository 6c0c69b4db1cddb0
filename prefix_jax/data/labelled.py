"""Tokenises records of a task with labels in the backbone's pretraining format.

Texts get the tokenizer's own special tokens, and two texts its pair template. As in transformers,
an encoder predicts the answer from the first token, [CLS], and a decoder from the last token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from prefix_jax.config import TaskConfig
from prefix_jax.data.batch import Example, Window
from prefix_jax.data.fields import LabelIndex, answers_of, list_of, number_of, words_of
from prefix_jax.data.source import Record
from prefix_jax.data.template import Template
from prefix_jax.data.tokens import Examples
from prefix_jax.errors import DataError
from prefix_jax.untrusted.tokenizer import encodings, token_ids

if TYPE_CHECKING:  # its import takes seconds
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Reading:
    """Turns the records of a task into labelled examples.

    Attributes:
        tokenizer: the backbone's tokenizer.
        task: the task, with its labels.
        input, pair: templates; see `DataConfig`.
        max_length: maximum number of tokens of a text or a pair, including special tokens.
        truncate: the side on which longer texts are cut.
        causal: whether the backbone is a decoder.
        segments: whether the backbone has segment embeddings for pairs of texts.
    """

    tokenizer: PreTrainedTokenizerFast
    task: TaskConfig
    input: str | None
    pair: str | None
    max_length: int
    truncate: Literal["left", "right"]
    causal: bool
    segments: bool

    def examples(self, records: Sequence[Record], answered: bool = True) -> Examples:
        """Builds one or more examples per record.

        Args:
            records: the records that fill the templates.
            answered: whether the records have answers. If not, the labels are 0 and the examples
                have no references.

        Raises:
            DataError: a record cannot become an example, or a template is invalid.
        """
        with self._cutting():
            if self.task.name == "tag":
                return self._tagged(records, answered)
            if self.task.name == "span":
                return self._windows(records, answered)
            if self.task.name == "choice":
                return self._choices(records, answered)
            return self._whole(records, answered)

    # The tasks.

    def _whole(self, records: Sequence[Record], answered: bool) -> Examples:
        """Builds examples with one answer per text or pair: a class or a value."""
        found, cut = [], []
        encoded = self._encode(*self._texts(records), records)
        for record, encoding, prompt in zip(records, encoded, self._prompts(records), strict=True):
            label: float = 0
            references: tuple[str, ...] = ()
            if answered and self.task.name == "regress":
                label = number_of(record, self.task.label)
                references = (str(label),)
            elif answered:
                field = self.task.label
                label = self._labels.number(record, field, record.value(field))
                references = (self._names[int(label)],)
            kind = np.float32 if self.task.name == "regress" else np.int32
            index_M = np.array([self._place(encoding)], np.int32)
            example = self._example(record, [encoding], index_M, np.array([label], kind))
            found.append(dataclasses.replace(example, references=references, prompt=prompt))
            cut += [record.source] * bool(encoding.overflowing)
        return Examples(found, cut)

    def _tagged(self, records: Sequence[Record], answered: bool) -> Examples:
        """Builds examples with one label per word, predicted from the word's first token."""
        words = [words_of(record, self.task.words) for record in records]
        found, cut = [], []
        encoded = self._encode([" ".join(texts) for texts in words], None, records)
        for record, texts, encoding in zip(records, words, encoded, strict=True):
            index_M, kept = _first_tokens(texts, encoding)
            labels = [0] * len(kept)
            references: tuple[str, ...] = ()
            if answered:
                tags = list_of(record, self.task.label)
                if len(tags) != len(texts):
                    raise DataError(
                        f"{record.source}: {len(tags)} tags in {self.task.label!r} for "
                        f"{len(texts)} words in {self.task.words!r}; every word needs one tag"
                    )
                # Tags of truncated words are checked too.
                numbers = [self._labels.number(record, self.task.label, tag) for tag in tags]
                labels = [numbers[word] for word in kept]
                references = tuple(self._names[label] for label in labels)
            if not kept:
                raise DataError(f"{record.source}: the words have no tokens; remove the record")
            example = self._example(record, [encoding], index_M, np.array(labels, np.int32))
            prompt = " ".join(texts[word] for word in kept)
            found.append(dataclasses.replace(example, references=references, prompt=prompt))
            cut += [record.source] * (len(kept) < len(texts))
        return Examples(found, cut)

    def _windows(self, records: Sequence[Record], answered: bool) -> Examples:
        """Builds examples that predict the start and the end of an answer.

        A long text becomes several overlapping windows. In a window without the answer, the start
        and the end are the first token.
        """
        questions, contexts = self._texts(records)
        assert contexts is not None  # as the configuration checks
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        asked = token_ids(self.tokenizer, questions, [record.source for record in records])
        found = []
        for number, (record, question, context) in enumerate(
            zip(records, questions, contexts, strict=True)
        ):
            if len(asked[number]) + special + self.task.stride >= self.max_length:
                raise DataError(
                    f"{record.source}: a question of {len(asked[number])} tokens and task.stride "
                    f"{self.task.stride} leave no room for the text within max_length "
                    f"{self.max_length}; raise data.max_length or lower task.stride"
                )
            answers = answers_of(record, self.task.label, context) if answered else []
            if answered and not answers and not self.task.unanswerable:
                raise DataError(
                    f"{record.source}: the question has no answer; remove the record, or set "
                    "task.unanswerable=true to allow unanswerable questions (SQuAD 2.0)"
                )
            windows = encodings(
                self.tokenizer,
                [question],
                [context],
                record.source,
                truncation="only_second",
                max_length=self.max_length,
                stride=self.task.stride,
                return_overflowing_tokens=True,
            )
            for encoding in windows:
                window = Window(number, context, _context_offsets(encoding))
                start, end = _span(window.offset_T2, answers)
                label_T = np.zeros(len(encoding.ids), np.int32)
                label_T[start] |= 1
                label_T[end] |= 2
                index_T = np.arange(len(label_T), dtype=np.int32)
                found.append(
                    dataclasses.replace(
                        self._example(record, [encoding], index_T, label_T),
                        candidates=True,
                        window=window,
                        prompt=f"{question}\n{context}",
                        references=tuple(dict.fromkeys(text for text, _ in answers)) or ("",)
                        if answered
                        else (),
                    )
                )
        return Examples(found)

    def _choices(self, records: Sequence[Record], answered: bool) -> Examples:
        """Builds examples with one answer among several texts, each paired with the same input."""
        templates = [Template(text) for text in self.task.choices or ()]
        inputs, _ = self._texts(records)
        texts = [[t for one in templates for t in one.render(record)] for record in records]
        first = [given for given, several in zip(inputs, texts, strict=True) for _ in several]
        owners = [record for record, several in zip(records, texts, strict=True) for _ in several]
        encoded = iter(self._encode(first, [text for several in texts for text in several], owners))
        found, cut = [], []
        for record, given, several in zip(records, inputs, texts, strict=True):
            parts = [next(encoded) for _ in several]
            starts = np.cumsum([0, *(len(part.ids) for part in parts)])[:-1]
            index_M = np.array(
                [start + self._place(part) for start, part in zip(starts, parts, strict=True)],
                np.int32,
            )
            label_M = np.zeros(len(parts), np.int32)
            references: tuple[str, ...] = ()
            if answered:
                names = self.task.labels or tuple(map(str, range(len(parts))))
                field = self.task.label
                index = LabelIndex(names[: len(parts)], "choice")
                right = index.number(record, field, record.value(field))
                label_M[right], references = 1, (several[right],)
            found.append(
                dataclasses.replace(
                    self._example(record, parts, index_M, label_M),
                    part_T=np.repeat(
                        np.arange(len(parts), dtype=np.int32), [len(part.ids) for part in parts]
                    ),
                    candidates=True,
                    choices=tuple(several),
                    references=references,
                    prompt=given,
                )
            )
            cut += [record.source] * any(part.overflowing for part in parts)
        return Examples(found, cut)

    # Texts and tokens.

    @property
    def _names(self) -> tuple[str, ...]:
        assert self.task.labels is not None, "the labels are not collected yet"
        return self.task.labels

    @functools.cached_property
    def _labels(self) -> LabelIndex:
        return LabelIndex(self._names)

    def _texts(self, records: Sequence[Record]) -> tuple[list[str], list[str] | None]:
        """Renders the inputs, and the pairs if there is a pair template."""
        assert self.input is not None  # as the configuration checks
        first, second = Template(self.input), self.pair
        inputs = [_render(first, record) for record in records]
        if second is None:
            return inputs, None
        return inputs, [_render(Template(second), record) for record in records]

    def _prompts(self, records: Sequence[Record]) -> list[str]:
        inputs, pairs = self._texts(records)
        if pairs is None:
            return inputs
        return [f"{one}\n{other}" for one, other in zip(inputs, pairs, strict=True)]

    def _encode(
        self, texts: list[str], pairs: list[str] | None, records: Sequence[Record]
    ) -> list[Encoding]:
        return encodings(
            self.tokenizer,
            texts,
            pairs,
            [record.source for record in records],
            truncation=True,
            max_length=self.max_length,
        )

    @contextlib.contextmanager
    def _cutting(self) -> Iterator[None]:
        """Sets the tokenizer's truncation side; windows always use the right side."""
        before = self.tokenizer.truncation_side
        self.tokenizer.truncation_side = "right" if self.task.name == "span" else self.truncate
        try:
            yield
        finally:
            self.tokenizer.truncation_side = before

    def _place(self, encoding: Encoding) -> int:
        """The column whose hidden state the head reads."""
        return len(encoding.ids) - 1 if self.causal else 0

    def _example(
        self,
        record: Record,
        parts: Sequence[Encoding],
        index_M: np.ndarray,
        label_M: np.ndarray,
    ) -> Example:
        if not all(part.ids for part in parts):
            raise DataError(f"{record.source}: the text has no tokens; remove the record")
        token_type_T = None
        if self.segments:
            token_type_T = np.array([i for part in parts for i in part.type_ids], np.int32)
        return Example(
            ids_T=np.array([i for part in parts for i in part.ids], np.int32),
            index_M=index_M,
            label_M=label_M,
            source=record.source,
            whole=True,
            token_type_T=token_type_T,
            task=record.task,
        )


def _render(template: Template, record: Record) -> str:
    texts = template.render(record)
    if len(texts) > 1:
        raise DataError(
            f"{record.source}: {template.text!r} has {len(texts)} alternatives; an input must have "
            "exactly one text"
        )
    return texts[0]


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
