"""The base classes of tasks: what a model is asked to do.

    Task → examples → batch → outputs → predictions → metrics

A task is a frozen dataclass whose fields are its config. It turns records into examples, names the
head that a model needs for it, and turns the model's outputs into predictions and scores. The
training loop, the evaluator and `Tuned` receive it as one value, and a stored prefix contains it.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

import jax
import numpy as np

from prefix_jax.data.batch import Batch, Example, Examples
from prefix_jax.data.source import Record
from prefix_jax.data.special import end_tokens
from prefix_jax.errors import PrefixError
from prefix_jax.nn.head import Head
from prefix_jax.tasks.metrics import Metric
from prefix_jax.tasks.prepare import fields_needed, prepare_records
from prefix_jax.tasks.template import Template
from prefix_jax.validation import Interval, check_fields

if TYPE_CHECKING:  # its import takes seconds
    from transformers import PreTrainedTokenizerFast

    from prefix_jax.backbones.architecture import Architecture
    from prefix_jax.methods.base import Method


@dataclasses.dataclass(frozen=True)
class EncoderDecoder:
    """Tokenisation options of an encoder-decoder.

    The encoder reads the input, and the decoder its start token and the target. Both texts have
    the special tokens that the tokenizer adds, as in transformers: T5's labels end with </s>, and
    BART's also begin with <s>.

    Attributes:
        start_id: the decoder's start token.
        max_target: maximum tokens of a target, including special tokens.
        source_needed: whether an empty input is an error. It is allowed if soft tokens precede it.
    """

    start_id: int
    max_target: int
    source_needed: bool = True


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a model reads text: its tokenizer, and the room that its prefix leaves.

    `prefix_jax.model.reader_of` makes the reader of a backbone with a prefix.

    Attributes:
        tokenizer: the backbone's tokenizer, with its chat template.
        room: maximum tokens of an example, or of the encoder input; None for no limit.
        causal: whether the model is a decoder, whose last token has read the whole text. The first
            token of an encoder has, too.
        token_types: whether the model has embeddings for the first and the second of two texts.
        end_ids: end tokens from the checkpoint (`Architecture.end_ids`).
        encoder_decoder: options of an encoder-decoder; None for a single stack.
    """

    tokenizer: PreTrainedTokenizerFast = dataclasses.field(repr=False)
    room: int | None = None
    causal: bool = True
    token_types: bool = False
    end_ids: tuple[int, ...] = ()
    encoder_decoder: EncoderDecoder | None = None


class Prompt(NamedTuple):
    """A prompt for generation.

    Attributes:
        text: for people and files.
        ids: its tokens, including special tokens; in an encoder-decoder, the encoder's input.
    """

    text: str
    ids: list[int]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one input.

    Attributes:
        origin: where the input comes from: "test.jsonl:17".
        prompt: the rendered input.
        prediction: the generated text, or the answer as a text.
        references: the correct texts.
        scores: for a task with a head, the probability or score of each answer; for a span, its
            score and that of "no answer". None for generated text.
        value, target: the predicted and the correct answer in the form that the task's metrics
            compare. They are not stored. `target` is None if the correct answer is unknown.
    """

    origin: str
    prompt: str
    prediction: str
    references: Sequence[str]
    scores: Mapping[str, float] | None = None
    value: Any = dataclasses.field(default=None, compare=False, repr=False)
    target: Any = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """What a model is asked to do. The fields of a subclass are its config.

    Attributes:
        prepare: the preparation of the records of a published dataset: a key of `PREPARE`.
        max_length: maximum tokens of an example, not counting the prefix; in an encoder-decoder, of
            the encoder input. None allows as many as fit the model's positions.
        truncate: the side on which inputs that are too long are cut. Targets are never cut.

    Raises:
        ConfigError: a field has a wrong value.
        DataError: a template is malformed.
    """

    prepare: str | None = None
    max_length: Annotated[int, Interval(ge=2, le=2**24)] | None = None
    truncate: Literal["left", "right"] = "left"

    # The fields that are templates of an example's texts.
    template_fields: ClassVar[tuple[str, ...]] = ()
    # Whether the language model writes the answers, rather than a head.
    generates: ClassVar[bool] = False
    # The dtype of targets: tokens and classes, or values.
    label_dtype: ClassVar[type[np.generic]] = np.int32
    # Whether the targets of an example are candidates for one answer.
    candidates: ClassVar[bool] = False
    # Whether an example has about as many targets as tokens.
    dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self, "task")
        fields_needed((), self.prepare)
        for text in self.templates.values():
            Template(text)

    @property
    @abc.abstractmethod
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics of the task by name. "loss" is one of them."""

    # Templates.

    @property
    def templates(self) -> dict[str, str]:
        """The templates of an example's texts that are set, by the name of their field."""
        values = {name: getattr(self, name) for name in self.template_fields}
        return {name: text for name, text in values.items() if text is not None}

    @property
    def form(self) -> tuple[str, ...] | None:
        """The fields of a prompt, in the order in which a person fills them in.

        None if this task has no template for prompts, so that only text can be continued.
        """
        return None

    def filled(self, values: Sequence[str]) -> Mapping[str, Any]:
        """Returns the record of a prompt, from one value per field of `form`."""
        return dict(zip(self.form or (), values, strict=True))

    def of_texts(self, texts: Sequence[str]) -> tuple[Task, list[Mapping[str, Any]]]:
        """Returns the task and the records for texts that replace those from the templates.

        Raises:
            PrefixError: the task needs more than a text.
        """
        raise PrefixError("this task needs more than one text per input; give records, not texts")

    def prompt_fields(self, record: Record) -> Mapping[str, Any] | None:
        """Returns the fields of a record that its prompt needs; None without a template."""
        names = self.form
        return None if names is None else {name: record.value(name) for name in names}

    def prepared(self, records: Sequence[Record]) -> list[Record]:
        """Adds the derived field of `prepare` to every record."""
        return prepare_records(records, self.prepare)

    def probe(self, record: Record) -> None:
        """Renders a record with every template.

        Raises:
            DataError: the record does not have a template's fields.
        """
        (record,) = self.prepared([record])
        for text in self.templates.values():
            Template(text).render(record)

    # Fit.

    @abc.abstractmethod
    def check(self, architecture: Architecture, method: Method[Any] | None) -> None:
        """Checks that a model with a prefix can do this, before any weights are loaded.

        Raises:
            ConfigError: the task lacks a field, or does not fit the model or the method.
        """

    def head(self, architecture: Architecture) -> Head | None:
        """Returns the head that the task trains on a model; None for the language model's own."""
        return None

    def collect(self, records: Sequence[Record]) -> Task:
        """Fills in what the training records define: the names of the labels."""
        return self

    # Records → examples.

    @abc.abstractmethod
    def examples(self, records: Sequence[Record], reader: Reader, answers: bool = True) -> Examples:
        """Tokenises records and their targets.

        Args:
            records: the records.
            reader: how the model reads text.
            answers: whether the records contain the answers. If not, targets are 0 and examples
                have no references.

        Raises:
            DataError: a record cannot become an example.
        """

    def unscored(self) -> Self:
        """Returns the task without fields that are read only for scoring predictions."""
        return self

    def prompt(self, record: Record, reader: Reader) -> Prompt:
        """Renders and tokenises the prompt of a record, for generation.

        Raises:
            DataError: the record cannot become a prompt.
            PrefixError: the task generates no text, or has no template.
        """
        raise PrefixError(
            "this prefix was trained with a head and cannot generate text; use predict"
        )

    def ends(self, reader: Reader) -> tuple[int, ...]:
        """Returns the tokens that end a generated text."""
        return end_tokens(reader.tokenizer, reader.end_ids)

    def limit(self, reader: Reader) -> int | None:
        """Returns the maximum tokens of an example."""
        return reader.room if self.max_length is None else self.max_length

    # Outputs → predictions.

    def inputs(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Returns the examples with distinct inputs: each gets one output."""
        return examples

    @abc.abstractmethod
    def predictions(self, examples: Sequence[Example], outputs: Sequence[Any]) -> list[Prediction]:
        """Turns a model's outputs into predictions.

        Args:
            examples: the inputs.
            outputs: one per input: a text, or out_MY of the head without padding.
        """

    def losses(self, out_BMY: jax.Array, batch: Batch) -> jax.Array:
        """Returns the summed loss of each row's targets, [B], from the outputs of the head."""
        raise NotImplementedError(f"{type(self).__name__} has no head")
