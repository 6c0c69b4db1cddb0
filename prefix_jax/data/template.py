"""Records → text: `{field}` templates for an input and a target, and chats.

What is rendered is a list of segments, each either given or learnt. Segments are tokenised apart
(`tokens.py`), so that what is given has the same tokens whatever follows it.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefix_jax.data.source import Record
from prefix_jax.errors import DataError
from prefix_jax.untrusted.chat import render_chat_template
from prefix_jax.untrusted.tokenizer import check_text

# Texts in a list; each becomes an example with all of its input.
MAX_ALTERNATIVES = 10_000
# Characters of a reference that is no target: ROUGE-L takes time in the product of two lengths.
MAX_REFERENCE = 100_000
# Turns of a chat times its characters: it is rendered up to each of its answers.
MAX_CHAT_SIZE = 2**27


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of text, and whether its tokens are targets."""

    text: str
    target: bool


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One example as text.

    Attributes:
        segments: in order; a target segment is one answer.
        source: where the record came from.
        references: every acceptable text of the last target.
        chat: whether a chat template made the segments. It then writes the special tokens, which
            are otherwise added around the text.
        task: of the record.
    """

    segments: tuple[Segment, ...]
    source: str
    references: tuple[str, ...]
    chat: bool = False
    task: int | None = None

    @property
    def prompt(self) -> str:
        """The text before the last target."""
        last = max(i for i, segment in enumerate(self.segments) if segment.target)
        return "".join(segment.text for segment in self.segments[:last])


@dataclasses.dataclass(frozen=True)
class Template:
    """Text with fields in braces: "{mr} => ". A literal brace is doubled.

    A field is a name and nothing else: no index, attribute, conversion or format is looked at, so
    that "{a.b}" means the field called "a.b".

    Raises:
        DataError: an unbalanced brace, or braces that hold anything but a name.
    """

    text: str

    def __post_init__(self) -> None:
        self._parts()

    @property
    def fields(self) -> tuple[str, ...]:
        """The names in braces, in order."""
        return tuple(name for _, name in self._parts() if name is not None)

    def render(self, record: Record) -> list[str]:
        """The text for a record; several texts where a field holds a list of alternatives.

        Raises:
            DataError: a field is missing, null, NaN or not text, or two fields hold lists.
        """
        texts, listed = [""], None
        for literal, name in self._parts():
            values = [""] if name is None else _texts(record, name)
            if name is not None and isinstance(record.value(name), list):
                if listed is not None:
                    raise DataError(
                        f"{record.source}: fields {listed!r} and {name!r} both hold lists; "
                        f"the template {self.text!r} may use one"
                    )
                listed = name
            texts = [text + literal + value for text in texts for value in values]
        return texts

    def _parts(self) -> list[tuple[str, str | None]]:
        """Pairs of literal text and the name of the field that follows it, if one does."""
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise DataError(
                f"template {self.text!r}: {error}; write a literal brace twice"
            ) from error
        for _, name, spec, conversion in parts:
            if name is not None and (not name or spec or conversion):
                raise DataError(
                    f"template {self.text!r}: braces hold the name of a field and nothing else; "
                    "write a literal brace twice"
                )
        return [(literal, name) for literal, name, _, _ in parts]


def _texts(record: Record, name: str) -> list[str]:
    value = record.value(name)
    values = value if isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, str | int | float):
            raise DataError(
                f"{record.source}: field {name!r} holds a {type(item).__name__}; "
                "templates take text and numbers"
            )
        if item != item:
            raise DataError(f"{record.source}: field {name!r} holds NaN; fill it in or remove it")
    if not values:
        raise DataError(f"{record.source}: field {name!r} is an empty list")
    if len(values) > MAX_ALTERNATIVES:
        raise DataError(
            f"{record.source}: field {name!r} is a list of {len(values):,} texts, each of which "
            f"would be an example; at most {MAX_ALTERNATIVES:,} are read"
        )
    texts = [str(item) for item in values]
    check_unicode(texts, record.source)
    return texts


def check_unicode(texts: Iterable[str], source: str) -> None:
    """Raises DataError if texts hold half of a surrogate pair, as JSON can: no tokenizer reads it.

    Args:
        texts: of a record.
        source: of the record.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{source}: not valid Unicode text: {error.reason}") from None


def render(
    record: Record, *, input: Template | None, target: Template, references: str | None = None
) -> list[Rendered]:
    """Renders input and target: one example, or one for each alternative of the target.

    Args:
        record: what fills the templates.
        input: the text that is given; None gives nothing.
        target: the text to learn.
        references: the field that holds the acceptable texts; None takes the rendered targets.

    Raises:
        DataError: a field is missing or unusable, or a target is empty.
    """
    given = [""] if input is None else input.render(record)
    if input is not None and len(given) > 1:
        raise DataError(
            f"{record.source}: the input {input.text!r} has {len(given)} alternatives; "
            "only a target may hold a list"
        )
    answers = target.render(record)
    if not all(answer.strip() for answer in answers):
        raise DataError(f"{record.source}: the target {target.text!r} is empty")
    accepted = tuple(answers if references is None else _texts(record, references))
    if references is not None and (longest := max(map(len, accepted))) > MAX_REFERENCE:
        raise DataError(
            f"{record.source}: field {references!r} holds a reference of {longest:,} characters; "
            f"metrics compare at most {MAX_REFERENCE:,}"
        )
    segments = [Segment(text, False) for text in given if text]
    return [
        Rendered((*segments, Segment(answer, True)), record.source, accepted, task=record.task)
        for answer in answers
    ]


def render_chat(record: Record, field: str, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Renders a chat through the tokenizer's template; the assistant's turns are targets.

    The template is asked for the conversation before and after each assistant's turn. The turn is
    the difference, so it holds its end-of-turn token, and no knowledge of a template is needed.

    Raises:
        DataError: the field is not a list of {"role", "content"} with an assistant's turn; the
            tokenizer has no chat template, or its template refuses the chat or rewrites earlier
            turns when later ones follow.
    """
    turns = _turns(record, field)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise DataError(f"{record.source}: field {field!r} has no assistant's turn to learn from")

    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    cuts = [cut for i in answers for cut in ((i, True), (i + 1, False))]
    texts = _chat_texts(record, field, turns, tokenizer, cuts)
    segments, done = [], ""
    for i, before, after in zip(answers, texts[::2], texts[1::2], strict=True):
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"{record.source}: the tokenizer's chat template rewrites earlier turns at turn "
                f"{i + 1}, so what the model sees in training would differ from generation; "
                "split the chat into records that end at one assistant's turn each"
            )
        segments += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
        done = after
    answer = next(turn["content"] for turn in reversed(turns) if turn["role"] == "assistant")
    return Rendered(tuple(segments), record.source, (answer,), chat=True, task=record.task)


def render_chat_prompt(record: Record, field: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Renders a chat up to where the assistant answers; a last answer that is there is left out.

    Raises:
        DataError: as `render_chat`, or nothing is left to answer.
    """
    turns = list(_turns(record, field))
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise DataError(f"{record.source}: the chat in {field!r} has no turn to answer")
    return _chat_texts(record, field, turns, tokenizer, [(len(turns), True)])[0]


def _turns(record: Record, field: str) -> list[Mapping[str, Any]]:
    turns = record.value(field)
    if not isinstance(turns, list):
        raise DataError(f"{record.source}: field {field!r} must hold a list of turns")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            raise DataError(
                f'{record.source}: turn {number} of {field!r} must be {{"role": …, "content": …}} '
                "with text in both"
            )
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise DataError(f"{record.source}: the assistant's turn {number} is empty")
    size = sum(len(turn["content"]) for turn in turns)
    if len(turns) * max(size, len(turns)) > MAX_CHAT_SIZE:
        raise DataError(
            f"{record.source}: the chat in {field!r} has {len(turns):,} turns and {size:,} "
            "characters, too much to be rendered up to each answer; split it into several records"
        )
    if turns and turns[0]["role"] == "assistant":
        raise DataError(
            f"{record.source}: the chat in {field!r} opens with the assistant, who has nothing to "
            "answer; begin it with a user's turn"
        )
    return turns


def _chat_texts(
    record: Record,
    field: str,
    turns: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    cuts: Sequence[tuple[int, bool]],
) -> list[str]:
    """Renders the first turns of a chat; per text, their number and whether an answer follows."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"{record.source}: the tokenizer has no chat template for field {field!r}; "
            "take an instruction-tuned model, or templates for input and target"
        )
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise DataError(
            f"{record.source}: none of the tokenizer's chat templates is called default; set "
            "tokenizer.chat_template to one of them"
        ) from None
    if not isinstance(template, str):
        raise DataError(
            f"{record.source}: the tokenizer's chat template must be a string, "
            f"got {type(template).__name__}"
        )
    for turn in turns:
        check_text(turn["content"], record.source, DataError)
    return render_chat_template(
        template, tokenizer.special_tokens_map, turns, cuts, record.source, DataError
    )
