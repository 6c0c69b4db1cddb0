"""Shared parts of the tasks whose answers come from a trained head."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np

from prefix_jax.data.batch import Batch, Example, Examples
from prefix_jax.data.source import Record
from prefix_jax.errors import ConfigError, DataError, PrefixError
from prefix_jax.nn.head import Head
from prefix_jax.prefix import Embeds
from prefix_jax.tasks.base import Prediction, Reader, Task
from prefix_jax.tasks.prepare import fields_needed
from prefix_jax.tasks.template import Template
from prefix_jax.untrusted.tokenizer import encodings
from prefix_jax.validation import Fraction

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

    from prefix_jax.backbones.architecture import Architecture
    from prefix_jax.methods.base import Method

# Models whose classification head has its own layer in place of BERT's pretrained pooler.
_OWN_LAYER = {
    "roberta": "tanh",
    "xlm-roberta": "tanh",
    "camembert": "tanh",
    "electra": "gelu",
    "distilbert": "relu",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadTask(Task):
    """A task whose answers come from a head that trains together with the prefix.

    Texts are read in the backbone's pretraining format: with the tokenizer's own special tokens,
    and two texts in its pair template.

    Attributes:
        label: the field of a record with the correct answer.
    """

    label: str = "label"

    def check(self, architecture: Architecture, method: Method[Any] | None) -> None:
        if architecture.encoder is not None:
            raise ConfigError(
                f"task.name: {architecture.model_type} is an encoder-decoder, but a head needs an "
                "encoder or a decoder; let it generate the label as text (task.name: generate)"
            )

    @abc.abstractmethod
    def head(self, architecture: Architecture) -> Head:
        """Returns the head; unlike for other tasks, there always is one."""

    @abc.abstractmethod
    def losses(self, out_BMY: jax.Array, batch: Batch) -> jax.Array:
        """Returns the summed loss of each row's targets, [B], from the outputs of the head."""

    def encode(
        self,
        reader: Reader,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        records: Sequence[Record],
    ) -> list[Encoding]:
        """Tokenises texts, or pairs of texts, with special tokens, and cuts them to the limit."""
        limit = self.limit(reader)
        with truncating(reader.tokenizer, self.truncate):
            return encodings(
                reader.tokenizer,
                [*texts],
                None if pairs is None else [*pairs],
                [record.origin for record in records],
                truncation=limit is not None,
                max_length=limit,
            )

    def example(
        self,
        record: Record,
        parts: Sequence[Encoding],
        index_M: Any,
        label_M: Any,
        reader: Reader,
        **fields: Any,
    ) -> Example:
        """Makes an example.

        Args:
            record: its record.
            parts: the texts; several do not attend to each other.
            index_M: the columns whose hidden states the head reads.
            label_M: the target at each column.
            reader: how the model reads text.
            fields: further attributes of the example.
        """
        if not all(part.ids for part in parts):
            raise DataError(f"{record.origin}: the text has no tokens; remove the record")
        types = [i for part in parts for i in part.type_ids] if reader.token_types else None
        return Example(
            ids_T=np.array([i for part in parts for i in part.ids], np.int32),
            index_M=np.asarray(index_M, np.int32),
            label_M=np.asarray(label_M, self.label_dtype),
            origin=record.origin,
            whole=True,
            token_type_T=None if types is None else np.array(types, np.int32),
            candidates=self.candidates,
            dataset=record.dataset,
            **fields,
        )


@dataclasses.dataclass(frozen=True)
class SequenceTask(HeadTask):
    """A task with one answer for a text, or for a pair of texts.

    As in transformers, an encoder predicts the answer from the first token, [CLS], and a decoder
    from the last token.

    Attributes:
        input: the template of the text.
        pair: the template of a second text; None for no second text.
        dropout: the dropout rate of the head's input in training, for models whose head has
            dropout.
        reads_soft: whether the head reads the first of the soft tokens before an encoder, as PEFT's
            does, instead of the text's first token.
    """

    input: str | None = None
    pair: str | None = None
    dropout: Fraction = dataclasses.field(default=0.1, kw_only=True)
    reads_soft: bool = dataclasses.field(default=False, kw_only=True)

    template_fields: ClassVar[tuple[str, ...]] = ("input", "pair")

    @property
    def form(self) -> tuple[str, ...] | None:
        names = (name for text in self.templates.values() for name in Template(text).fields)
        return None if self.input is None else fields_needed(names, self.prepare)

    def check(self, architecture: Architecture, method: Method[Any] | None) -> None:
        super().check(architecture, method)
        require_template(self.input, "input")
        if self.reads_soft and not soft_tokens_precede_text(architecture, method):
            raise ConfigError(
                "task.reads_soft: no soft tokens precede an encoder's text, so a head cannot read "
                "the first one; leave it out, or train soft tokens (method.name: prompt)"
            )

    def of_texts(self, texts: Sequence[str]) -> tuple[Task, list[Mapping[str, Any]]]:
        if self.pair is not None:
            raise PrefixError("this prefix needs pairs of texts; give records, not texts")
        task = dataclasses.replace(self, input="{text}", prepare=None)
        return task, [{"text": text} for text in texts]

    @abc.abstractmethod
    def answer(self, record: Record) -> tuple[float, str]:
        """Returns the target of a record, and the answer as a text."""

    def examples(self, records: Sequence[Record], reader: Reader, answers: bool = True) -> Examples:
        records = self.prepared(records)
        texts, pairs = self._texts(records)
        examples, cut = [], []
        encoded = self.encode(reader, texts, pairs, records)
        for i, (record, encoding) in enumerate(zip(records, encoded, strict=True)):
            label, name = self.answer(record) if answers else (0, None)
            examples.append(
                self.example(
                    record,
                    [encoding],
                    [answer_column(encoding, reader)],
                    [label],
                    reader,
                    references=() if name is None else (name,),
                    prompt=texts[i] if pairs is None else f"{texts[i]}\n{pairs[i]}",
                )
            )
            cut += [record.origin] * bool(encoding.overflowing)
        return Examples(examples, cut)

    def _texts(self, records: Sequence[Record]) -> tuple[list[str], list[str] | None]:
        """Renders the texts, and the second texts if there is a template for them."""
        first, second = template_of(self.input, "input"), self.pair
        texts = [first.render_one(record) for record in records]
        if second is None:
            return texts, None
        return texts, [Template(second).render_one(record) for record in records]

    def head_of(self, architecture: Architecture, outputs: int) -> Head:
        """Returns the head with Y outputs."""
        head = sequence_head(architecture, outputs, self.dropout)
        return dataclasses.replace(head, soft=self.reads_soft)


def require_template(text: str | None, name: str) -> None:
    """Raises ConfigError if a task that is about to train lacks a template."""
    if text is None:
        raise ConfigError(
            f"data.{name}: missing; give a template of the text to read, such as '{{text}}'"
        )


def template_of(text: str | None, name: str) -> Template:
    """Returns a template that a stored prefix may lack.

    Raises:
        PrefixError: it does.
    """
    if text is None:
        raise PrefixError(
            "this prefix was stored without templates, so records cannot be rendered as text; "
            f"import a PEFT adapter with data.{name}=…"
        )
    return Template(text)


def predict(
    example: Example,
    text: str,
    value: Any,
    target: Any,
    scores: dict[str, float] | None = None,
) -> Prediction:
    """Returns the prediction for an example; without references, its target is unknown."""
    return Prediction(
        example.origin,
        example.prompt,
        text,
        example.references,
        scores,
        value,
        target if example.references else None,
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities in float64."""
    logits = logits.astype(np.float64)
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def answer_column(encoding: Encoding, reader: Reader) -> int:
    """Returns the column of a text that has read all of it: the last, or an encoder's first."""
    return len(encoding.ids) - 1 if reader.causal else 0


def sequence_head(
    architecture: Architecture, outputs: int, dropout: float, *, prefer_pooler: bool = False
) -> Head:
    """Returns the head that transformers puts on a text as a whole, which depends on the model.

    Args:
        architecture: the backbone's.
        outputs: the number of outputs Y.
        dropout: the dropout rate, for models whose head has dropout.
        prefer_pooler: read the pretrained pooler, if there is one, even in models whose
            classification head does not (RoBERTa).
    """
    if architecture.causal:
        return Head(outputs, bias=False)
    own = _OWN_LAYER.get(architecture.model_type)
    if architecture.pooler and (own is None or prefer_pooler):
        return Head(outputs, pooled=True, dropout=dropout)
    return Head(outputs, activation=own or "tanh", dropout=dropout, drop_input=own != "relu")


def soft_tokens_precede_text(architecture: Architecture, method: Method[Any] | None) -> bool:
    """Returns whether soft tokens precede an encoder's text, so that each text needs a row."""
    return method is not None and method.produces is Embeds and not architecture.causal


@contextlib.contextmanager
def truncating(tokenizer: PreTrainedTokenizerFast, side: str) -> Iterator[None]:
    """Sets the tokenizer's truncation side."""
    before = tokenizer.truncation_side
    tokenizer.truncation_side = side
    try:
        yield
    finally:
        tokenizer.truncation_side = before
