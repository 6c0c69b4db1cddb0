"""Renders records as text: `{field}` templates for input and target, and chats.

The result is a list of segments, each either context or target. Segments are tokenised separately
(`tokens.py`), so that the tokens of a context do not depend on the target.
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

# Maximum texts in a list; each becomes an example with the whole input.
MAX_ALTERNATIVES = 10_000
# Maximum characters of a reference from a field: ROUGE-L is quadratic in the lengths.
MAX_REFERENCE = 100_000
# Maximum turns times characters of a chat, which is rendered once per answer.
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
        segments: the segments in order; each target segment is one answer.
        source: the origin of the record.
        references: every acceptable text for the last target.
        chat: whether the segments come from a chat template. If so, it has written the special
            tokens; otherwise they are added around the text.
        task: the record's task index.
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
    """A text with fields in braces: "{mr} => ". A literal brace is doubled.

    Braces contain only the name of a field: "{a.b}" is the field named "a.b". Indices, attributes,
    conversions and format specifications are not supported.

    Raises:
        DataError: a brace is unbalanced, or braces contain anything but a name.
    """

    text: str

    def __post_init__(self) -> None:
        self._parts()

    @property
    def fields(self) -> tuple[str, ...]:
        """The names in braces, in order."""
        return tuple(name for _, name in self._parts() if name is not None)

    def render(self, record: Record) -> list[str]:
        """Renders a record as one text, or as several if a field is a list of alternatives.

        Raises:
            DataError: a field is missing, null, NaN or not text, or two fields are lists.
        """
        texts, listed = [""], None
        for literal, name in self._parts():
            values = [""] if name is None else _texts(record, name)
            if name is not None and isinstance(record.value(name), list):
                if listed is not None:
                    raise DataError(
                        f"{record.source}: fields {listed!r} and {name!r} are both lists; "
                        f"the template {self.text!r} may use only one list"
                    )
                listed = name
            texts = [text + literal + value for text in texts for value in values]
        return texts

    def _parts(self) -> list[tuple[str, str | None]]:
        """Splits the text into pairs of literal text and the name of the next field, if any."""
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise DataError(
                f"template {self.text!r}: {error}; write a literal brace twice"
            ) from error
        for _, name, spec, conversion in parts:
            if name is not None and (not name or spec or conversion):
                raise DataError(
                    f"template {self.text!r}: braces may contain only the name of a field; "
                    "write a literal brace twice"
                )
        return [(literal, name) for literal, name, _, _ in parts]


def _texts(record: Record, name: str) -> list[str]:
    value = record.value(name)
    values = value if isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, str | int | float):
            raise DataError(
                f"{record.source}: field {name!r} must be a text or a number, got "
                f"{type(item).__name__}"
            )
        if item != item:
            raise DataError(
                f"{record.source}: field {name!r} contains NaN; fill it in or remove it"
            )
    if not values:
        raise DataError(f"{record.source}: field {name!r} is an empty list")
    if len(values) > MAX_ALTERNATIVES:
        raise DataError(
            f"{record.source}: field {name!r} is a list of {len(values):,} texts; at most "
            f"{MAX_ALTERNATIVES:,} are supported, since each becomes an example"
        )
    texts = [str(item) for item in values]
    check_unicode(texts, record.source)
    return texts


def check_unicode(texts: Iterable[str], source: str) -> None:
    """Raises DataError for unpaired surrogates, which JSON allows and tokenizers cannot encode.

    Args:
        texts: the texts of a record.
        source: the origin of the record.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{source}: not valid Unicode text: {error.reason}") from None


def render(
    record: Record, *, input: Template | None, target: Template, references: str | None = None
) -> list[Rendered]:
    """Renders input and target as one example, or one per alternative of the target.

    Args:
        record: the record that fills the templates.
        input: the input template; None for no input.
        target: the target template.
        references: the field with the acceptable texts; None uses the rendered targets.

    Raises:
        DataError: a field is missing or unusable, or a target is empty.
    """
    given = [""] if input is None else input.render(record)
    if input is not None and len(given) > 1:
        raise DataError(
            f"{record.source}: the input {input.text!r} has {len(given)} alternatives; "
            "only the target may use a list"
        )
    answers = target.render(record)
    if not all(answer.strip() for answer in answers):
        raise DataError(f"{record.source}: the target {target.text!r} is empty")
    accepted = tuple(answers if references is None else _texts(record, references))
    if references is not None and (longest := max(map(len, accepted))) > MAX_REFERENCE:
        raise DataError(
            f"{record.source}: field {references!r} has a reference of {longest:,} characters; "
            f"metrics support at most {MAX_REFERENCE:,}"
        )
    segments = [Segment(text, False) for text in given if text]
    return [
        Rendered((*segments, Segment(answer, True)), record.source, accepted, task=record.task)
        for answer in answers
    ]


def render_chat(record: Record, field: str, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Renders a chat with the tokenizer's chat template; the assistant turns are targets.

    The template renders the conversation before and after each assistant turn, and the turn is the
    difference. It therefore includes the end-of-turn token, for any template.

    Raises:
        DataError: the field is not a list of {"role", "content"} with an assistant turn; the
            tokenizer has no chat template; or the template rejects the chat, or changes earlier
            turns when later ones follow.
    """
    turns = _turns(record, field)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise DataError(f"{record.source}: field {field!r} has no assistant turn to learn from")

    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    cuts = [cut for i in answers for cut in ((i, True), (i + 1, False))]
    texts = _chat_texts(record, field, turns, tokenizer, cuts)
    segments, done = [], ""
    for i, before, after in zip(answers, texts[::2], texts[1::2], strict=True):
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"{record.source}: the tokenizer's chat template rewrites earlier turns at turn "
                f"{i + 1}, so what the model sees in training would differ from generation; "
                "split the chat into records with one assistant turn each, at the end"
            )
        segments += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
        done = after
    answer = next(turn["content"] for turn in reversed(turns) if turn["role"] == "assistant")
    return Rendered(tuple(segments), record.source, (answer,), chat=True, task=record.task)


def render_chat_prompt(record: Record, field: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Renders a chat up to the assistant's next answer; a final answer in the record is left out.

    Raises:
        DataError: see `render_chat`; or no user turn is left to answer.
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
        raise DataError(f"{record.source}: field {field!r} must be a list of turns")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            raise DataError(
                f'{record.source}: turn {number} of {field!r} must be {{"role": …, "content": …}} '
                "with text in both"
            )
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise DataError(f"{record.source}: turn {number}, of the assistant, is empty")
    size = sum(len(turn["content"]) for turn in turns)
    if len(turns) * max(size, len(turns)) > MAX_CHAT_SIZE:
        raise DataError(
            f"{record.source}: the chat in {field!r} has {len(turns):,} turns and {size:,} "
            "characters, too much to render once per answer; split it into several records"
        )
    if turns and turns[0]["role"] == "assistant":
        raise DataError(
            f"{record.source}: the chat in {field!r} begins with an assistant turn; begin it with "
            "a user turn"
        )
    return turns


def _chat_texts(
    record: Record,
    field: str,
    turns: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    cuts: Sequence[tuple[int, bool]],
) -> list[str]:
    """Renders the first turns of a chat, for each cut (number of turns, does an answer follow)."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"{record.source}: the tokenizer has no chat template for field {field!r}; "
            "use an instruction-tuned model, or templates for input and target"
        )
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise DataError(
            f"{record.source}: the tokenizer has no chat template named default; set "
            "tokenizer.chat_template to one of its templates"
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
