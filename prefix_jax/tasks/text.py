"""Text generation: the model learns to continue an input with a target.

    TextTask(input="{facts} =>", target=" {text}")

A record is rendered by two templates as spans of text: an input, which the model reads, and a
target, which it learns to write. Spans are tokenised separately, so that the tokens of the input do
not depend on the target. The loss is the negative log-likelihood of the target's tokens.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from prefix_jax.data.batch import Example, Examples
from prefix_jax.data.source import Record
from prefix_jax.data.special import eos_token, missing_start, special_around
from prefix_jax.errors import ConfigError, DataError, PrefixError
from prefix_jax.tasks.base import Prediction, Prompt, Reader, Task
from prefix_jax.tasks.metrics import TEXT_METRICS, Metric
from prefix_jax.tasks.prepare import fields_needed
from prefix_jax.tasks.template import Template, texts_of
from prefix_jax.untrusted.tokenizer import token_ids

if TYPE_CHECKING:
    from prefix_jax.backbones.architecture import Architecture
    from prefix_jax.methods.base import Method

# Maximum characters of a reference from a field: ROUGE-L is quadratic in the lengths.
MAX_REFERENCE = 100_000


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of text, and whether its tokens are targets."""

    text: str
    target: bool


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One example as text.

    Attributes:
        spans: the spans in order; each target span is one answer. The last span is a target.
        record: the record.
        references: every acceptable text for the last target.
        chat: whether the spans come from a chat template, which has already written the special
            tokens.
    """

    spans: tuple[Span, ...]
    record: Record
    references: tuple[str, ...]
    chat: bool = False

    @property
    def prompt(self) -> str:
        """The text before the last target."""
        last = max(i for i, span in enumerate(self.spans) if span.target)
        return "".join(span.text for span in self.spans[:last])


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationTask(Task):
    """A task whose answers are texts, written by the language model itself.

    Attributes:
        loss: the tokens to learn: those of the "target", or "all" but the first.
        on_overflow: what to do with an example whose target does not fit next to one token of
            input: raise an "error", or "drop" it.
    """

    loss: Literal["target", "all"] = "target"
    on_overflow: Literal["error", "drop"] = "error"

    generates: ClassVar[bool] = True
    dense: ClassVar[bool] = True

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Accuracy chooses the likeliest of `evaluate.labels`."""
        return {"loss": Metric("likelihood")} | {
            name: Metric("label" if name == "accuracy" else "text", score)
            for name, score in TEXT_METRICS.items()
        }

    @abc.abstractmethod
    def render(self, record: Record, reader: Reader) -> list[Rendered]:
        """Renders a prepared record as one example or several."""

    def check(self, architecture: Architecture, method: Method[Any] | None) -> None:
        if not architecture.causal:
            raise ConfigError(
                f"task.name: {architecture.model_type} is an encoder, which writes no text; choose "
                "a task with a head, such as classify, regress, tag, span or choice"
            )
        self._check_loss(two_stacks=architecture.encoder is not None)

    def _check_loss(self, two_stacks: bool) -> None:
        if two_stacks and self.loss == "all":
            raise ConfigError(
                "data.loss: all is not supported for an encoder-decoder, which does not predict "
                "its input; use data.loss: target"
            )

    def examples(self, records: Sequence[Record], reader: Reader, answers: bool = True) -> Examples:
        self._check_loss(two_stacks=reader.encoder_decoder is not None)
        task = self if answers else self.unscored()
        rendered = [
            item for record in task.prepared(records) for item in task.render(record, reader)
        ]
        return _Tokenizer(task, reader).examples(rendered)

    def inputs(self, examples: Sequence[Example]) -> list[Example]:
        """Merges examples with the same prompt, and their references."""
        grouped: dict[str, list[Example]] = {}
        for example in examples:
            grouped.setdefault(example.prompt, []).append(example)
        return [
            dataclasses.replace(
                same[0],
                references=tuple(
                    dict.fromkeys(text for example in same for text in example.references)
                ),
            )
            for same in grouped.values()
        ]

    def predictions(self, examples: Sequence[Example], outputs: Sequence[str]) -> list[Prediction]:
        return [
            Prediction(
                example.origin,
                example.prompt,
                text,
                tuple(example.references),
                value=text,
                target=example.references or None,
            )
            for example, text in zip(examples, outputs, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class TextTask(GenerationTask):
    """Continues an input with a target, both rendered from templates with `{field}`.

    Attributes:
        input: the input template; None for no input (plain language modelling).
        target: the target template. If one of its fields is a list, each item becomes an example.
        references: the field with every acceptable target, for scoring; None uses the rendered
            targets.
    """

    input: str | None = None
    target: str | None = None
    references: str | None = None

    template_fields: ClassVar[tuple[str, ...]] = ("input", "target")

    @property
    def form(self) -> tuple[str, ...] | None:
        if self.input is None:
            return None
        return fields_needed(Template(self.input).fields, self.prepare)

    def of_texts(self, texts: Sequence[str]) -> tuple[Task, list[Mapping[str, Any]]]:
        task = dataclasses.replace(self, input="{text}", prepare=None)
        return task, [{"text": text} for text in texts]

    def check(self, architecture: Architecture, method: Method[Any] | None) -> None:
        super().check(architecture, method)
        if self.target is None:
            raise ConfigError(
                "data.target: missing; give a template of the text to learn, such as '{text}', or "
                "data.messages, the field of a chat"
            )

    def unscored(self) -> Self:
        return dataclasses.replace(self, references=None)

    def render(self, record: Record, reader: Reader) -> list[Rendered]:
        """Renders input and target as one example, or one per alternative of the target."""
        if self.target is None:
            raise PrefixError(
                "this prefix was stored without templates, so records cannot be rendered as text; "
                "import a PEFT adapter with data.input=… and data.target=…"
            )
        text = "" if self.input is None else Template(self.input).render_one(record)
        targets = Template(self.target).render(record)
        if not all(target.strip() for target in targets):
            raise DataError(f"{record.origin}: the target {self.target!r} is empty")
        references = tuple(targets)
        if self.references is not None:
            references = tuple(texts_of(record, self.references))
            if (longest := max(map(len, references))) > MAX_REFERENCE:
                raise DataError(
                    f"{record.origin}: field {self.references!r} has a reference of {longest:,} "
                    f"characters; metrics support at most {MAX_REFERENCE:,}"
                )
        context = [Span(text, False)] if text else []
        return [Rendered((*context, Span(target, True)), record, references) for target in targets]

    def prompt(self, record: Record, reader: Reader) -> Prompt:
        if self.input is None and self.target is None:
            raise PrefixError(
                "this prefix has no template; give prompts as text, not as records, or import a "
                "PEFT adapter with data.input=…"
            )
        if self.input is None:
            raise PrefixError("this prefix was trained without inputs; give the text to continue")
        (record,) = self.prepared([record])
        text = Template(self.input).render_one(record)
        (ids,) = token_ids(reader.tokenizer, [text], record.origin)
        before, after = special_around(reader.tokenizer)
        if reader.encoder_decoder is not None:
            return Prompt(text, [*before, *ids, *after])
        return Prompt(text, [*missing_start(before, ids), *ids])


class _Overflow(Exception):
    """An example does not fit the length limit."""


class _Tokenizer:
    """Tokenises rendered examples, marks their targets and applies the length limit.

    A single stack reads input and target as one sequence, and an encoder-decoder as two:

        single stack      before | input | target | eos
        encoder           before | input | after
        decoder           start | before | target | after | eos

    `before` and `after` are the special tokens that the tokenizer adds around a text. A single
    stack gets those before the text, unless it already begins with them, but not those after it
    (Llama's with `add_eos_token`): between input and target, they would end the text. A chat has
    only the special tokens of its template, and the targets of a turn end with its last end token,
    because the line break that templates write after it is never generated.
    """

    def __init__(self, task: GenerationTask, reader: Reader):
        self.task, self.reader = task, reader
        self.limit = task.limit(reader)
        self.before, self.after = special_around(reader.tokenizer)
        self.ends = task.ends(reader)

    def examples(self, rendered: Sequence[Rendered]) -> Examples:
        """Tokenises examples.

        Raises:
            DataError: an example does not fit or has no target; the tokenizer has no
                end-of-sequence token; or the input of an encoder is empty.
        """
        self.ids_of = self._ids(rendered)
        examples, truncated, dropped = [], [], []
        for item in rendered:
            origin = item.record.origin
            try:
                example, cut = self._example(item)
            except _Overflow as error:
                if self.task.on_overflow == "error":
                    raise DataError(
                        f"{origin}: {error}, or set on_overflow: drop to leave such examples out"
                    ) from None
                dropped.append(origin)
                continue
            examples.append(example)
            truncated += [origin] * cut
        if not examples:
            decoder = self.reader.encoder_decoder
            target = "" if decoder is None else f" or {decoder.max_target} tokens of target"
            raise DataError(
                f"all {len(rendered)} examples exceed max_length {self.limit}{target}; raise "
                "max_length or shorten the targets"
            )
        return Examples(examples, truncated, dropped)

    def _ids(self, rendered: Sequence[Rendered]) -> dict[str, list[int]]:
        """Maps each distinct span's text to its tokens, using one tokenizer call."""
        if not all(item.chat for item in rendered):
            eos_token(self.reader.tokenizer)
        origins: dict[str, str] = {}
        for item in rendered:
            for span in item.spans:
                origins.setdefault(span.text, item.record.origin)
        encoded = token_ids(self.reader.tokenizer, list(origins), list(origins.values()))
        return dict(zip(origins, encoded, strict=True))

    def _example(self, item: Rendered) -> tuple[Example, bool]:
        """Returns an example, and whether its input was cut."""
        first = next(i for i, span in enumerate(item.spans) if span.target)
        given = [token for span in item.spans[:first] for token in self.ids_of[span.text]]
        answer, learnt, last = self._answer(item, item.spans[first:])
        decoder = self.reader.encoder_decoder
        if decoder is None:
            start = [] if item.chat else missing_start(self.before, given or answer)
            given = start + given
            # The special tokens at the start are never cut.
            kept = 0 if item.chat else min(len(self.before), len(given))
            given, cut = self._cut(item, given, kept, len(answer))
            ids, source = given + answer, None
        else:
            if len(answer) > decoder.max_target:
                raise _Overflow(
                    f"{len(answer)} tokens of target exceed the {decoder.max_target} that fit the "
                    "decoder, and targets are never cut; shorten the target"
                )
            if not given and decoder.source_needed:
                raise DataError(
                    f"{item.record.origin}: the input is empty, but an encoder needs at least one "
                    "token; set data.input to a template with text or a non-empty field"
                )
            given, cut = self._cut(item, given, 0, len(self.before) + len(self.after))
            ids, source = [decoder.start_id, *answer], [*self.before, *given, *self.after]
            last += len(self.before)
        prompt_length = len(ids) - len(answer) + last
        target_T = np.array([False] * (len(ids) - len(answer)) + learnt)
        if self.task.loss == "all":
            target_T[:] = True
        target_T[0] = False
        if not target_T.any():
            raise DataError(
                f"{item.record.origin}: its only token cannot be a target, because no token "
                "precedes it; give it an input"
            )
        return Example.of_text(
            np.array(ids, np.int32),
            target_T,
            item.record.origin,
            references=item.references,
            prompt=item.prompt,
            prompt_length=prompt_length,
            source_ids_S=None if source is None else np.array(source, np.int32),
            dataset=item.record.dataset,
        ), cut

    def _answer(self, item: Rendered, spans: Sequence[Span]) -> tuple[list[int], list[bool], int]:
        """Returns the tokens from the first target on, which of them are targets, and the start of
        the last target."""
        ids: list[int] = []
        learnt: list[bool] = []
        last = 0
        for span in spans:
            tokens = self.ids_of[span.text]
            if span.target:
                if not tokens:
                    raise DataError(f"{item.record.origin}: the target {span.text!r} has no tokens")
                last = len(ids)
            end = len(tokens)
            if span.target and item.chat:
                end = max((i + 1 for i, t in enumerate(tokens) if t in self.ends), default=0)
                if not end and span is spans[-1]:
                    tokens = [*tokens, eos_token(self.reader.tokenizer)]
                end = end or len(tokens)
            elif span.target:
                tokens = self._framed(tokens)
                end = len(tokens)
            ids += tokens
            learnt += [span.target and i < end for i in range(len(tokens))]
        return ids, learnt, last

    def _framed(self, target: list[int]) -> list[int]:
        """Adds the special tokens of a target that is not a chat's."""
        eos = eos_token(self.reader.tokenizer)
        if self.reader.encoder_decoder is None:
            return [*target, eos]
        return [*self.before, *target, *self.after, *([] if eos in self.after else [eos])]

    def _cut(
        self, item: Rendered, given: list[int], kept: int, fixed: int
    ) -> tuple[list[int], bool]:
        """Cuts an input to the limit.

        Args:
            item: the example.
            given: the input's tokens.
            kept: how many of them are special tokens at the start.
            fixed: the other tokens that the limit counts.
        """
        if self.limit is None:
            return given, False
        start, text = given[:kept], given[kept:]
        room = self.limit - fixed - kept
        if len(text) <= room:
            return given, False
        if room < min(1, len(text)):
            if self.reader.encoder_decoder is not None:
                raise _Overflow(
                    f"max_length {self.limit} leaves no room for input next to {fixed} special "
                    "tokens; raise max_length"
                )
            raise _Overflow(
                f"{len(given)} tokens of input and {fixed} from the first target on exceed "
                f"max_length {self.limit}, even with the input cut to one token; raise max_length"
            )
        text = text[len(text) - room :] if self.task.truncate == "left" else text[:room]
        return start + text, True
