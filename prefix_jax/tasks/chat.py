"""Chats: the model learns the assistant's turns of a conversation.

    ChatTask(messages="messages")

The tokenizer's chat template renders the conversation before and after every assistant turn, and
the turn is the difference. It therefore includes the end-of-turn token, for any template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefix_jax.data.source import Record
from prefix_jax.data.special import end_tokens
from prefix_jax.errors import ConfigError, DataError
from prefix_jax.tasks.base import Prompt, Reader, Task
from prefix_jax.tasks.text import GenerationTask, Rendered, Span
from prefix_jax.untrusted.chat import render_chat_template
from prefix_jax.untrusted.tokenizer import check_text, decode, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefix_jax.backbones.architecture import Architecture
    from prefix_jax.methods.base import Method

# Maximum turns times characters of a chat, which is rendered once per answer.
MAX_CHAT_SIZE = 2**27
# The shortest chat, from which `turn_end` finds out how a turn ends.
_PROBE = Record(
    {"chat": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]},
    "the chat template",
)


@dataclasses.dataclass(frozen=True)
class ChatTask(GenerationTask):
    """Writes the assistant's turns of a chat.

    Attributes:
        messages: the field with a list of {"role": …, "content": …}.
    """

    messages: str = "messages"

    @property
    def form(self) -> tuple[str, ...]:
        """A person writes the turn of the user."""
        return ("user",)

    def filled(self, values: Sequence[str]) -> Mapping[str, Any]:
        (text,) = values
        return {self.messages: [{"role": "user", "content": text}]}

    def of_texts(self, texts: Sequence[str]) -> tuple[Task, list[Mapping[str, Any]]]:
        """Each text becomes the turn of a user."""
        return self, [self.filled([text]) for text in texts]

    def prompt_fields(self, record: Record) -> Mapping[str, Any]:
        return {self.messages: _unanswered(record, self.messages)}

    def check(self, architecture: Architecture, method: Method[Any] | None) -> None:
        if architecture.encoder is not None:
            raise ConfigError(
                "data.messages: an encoder-decoder cannot train on chats; use templates "
                "(data.input, data.target), or a decoder-only model"
            )
        super().check(architecture, method)

    def ends(self, reader: Reader) -> tuple[int, ...]:
        """Includes the token that ends an assistant turn in the chat template.

        Gemma's `<end_of_turn>` is not the tokenizer's eos, and some checkpoints do not list it in
        `generation_config.json`.
        """
        turn = turn_end(reader.tokenizer)
        return end_tokens(reader.tokenizer, [*reader.end_ids, *([] if turn is None else [turn])])

    def render(self, record: Record, reader: Reader) -> list[Rendered]:
        """Renders a chat; the assistant turns are targets."""
        return [_render(record, self.messages, reader.tokenizer)]

    def prompt(self, record: Record, reader: Reader) -> Prompt:
        """Renders a chat up to the assistant's next answer; a final answer is left out."""
        (record,) = self.prepared([record])
        turns = _unanswered(record, self.messages)
        (text,) = _texts(record, self.messages, turns, reader.tokenizer, [(len(turns), True)])
        return Prompt(text, token_ids(reader.tokenizer, [text], record.origin)[0])


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the token that ends an assistant turn; None if the turn ends with plain text."""
    if tokenizer.chat_template is None:
        return None
    try:
        turn = _render(_PROBE, "chat", tokenizer).spans[-1].text
    except DataError:  # a template that refuses this chat may accept others
        return None
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for token in reversed(token_ids(tokenizer, [turn], "the chat template")[0]):
        if decode(tokenizer, [token]).strip():
            return int(token) if token in added else None
    return None


def _render(record: Record, field: str, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Renders a chat as alternating context and answers.

    Raises:
        DataError: the field is not a list of {"role", "content"} with an assistant turn; the
            tokenizer has no chat template; or the template rejects the chat, or changes earlier
            turns when later ones follow.
    """
    turns = _turns(record, field)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise DataError(f"{record.origin}: field {field!r} has no assistant turn to learn from")
    cuts = [cut for i in answers for cut in ((i, True), (i + 1, False))]
    texts = _texts(record, field, turns, tokenizer, cuts)
    spans, done = [], ""
    for i, before, after in zip(answers, texts[::2], texts[1::2], strict=True):
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"{record.origin}: the tokenizer's chat template rewrites earlier turns at turn "
                f"{i + 1}, so what the model sees in training would differ from generation; "
                "split the chat into records with one assistant turn each, at the end"
            )
        spans += [Span(before[len(done) :], False), Span(after[len(before) :], True)]
        done = after
    return Rendered(tuple(spans), record, (turns[answers[-1]]["content"],), chat=True)


def _unanswered(record: Record, field: str) -> list[Mapping[str, Any]]:
    """Returns the turns of a chat without the assistant's final answer.

    Raises:
        DataError: the field is not a chat, or no turn is left to answer.
    """
    turns = list(_turns(record, field))
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise DataError(f"{record.origin}: the chat in {field!r} has no turn to answer")
    return turns


def _turns(record: Record, field: str) -> list[Mapping[str, Any]]:
    turns = record.value(field)
    if not isinstance(turns, list):
        raise DataError(f"{record.origin}: field {field!r} must be a list of turns")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            raise DataError(
                f'{record.origin}: turn {number} of {field!r} must be {{"role": …, "content": …}} '
                "with text in both"
            )
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise DataError(f"{record.origin}: turn {number}, of the assistant, is empty")
    size = sum(len(turn["content"]) for turn in turns)
    if len(turns) * max(size, len(turns)) > MAX_CHAT_SIZE:
        raise DataError(
            f"{record.origin}: the chat in {field!r} has {len(turns):,} turns and {size:,} "
            "characters, too much to render once per answer; split it into several records"
        )
    if turns and turns[0]["role"] == "assistant":
        raise DataError(
            f"{record.origin}: the chat in {field!r} begins with an assistant turn; begin it with "
            "a user turn"
        )
    return turns


def _texts(
    record: Record,
    field: str,
    turns: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    cuts: Sequence[tuple[int, bool]],
) -> list[str]:
    """Renders the first turns of a chat, for each cut (number of turns, does an answer follow)."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"{record.origin}: the tokenizer has no chat template for field {field!r}; "
            "use an instruction-tuned model, or templates for input and target"
        )
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise DataError(
            f"{record.origin}: the tokenizer has no chat template named default; set "
            "tokenizer.chat_template to one of its templates"
        ) from None
    if not isinstance(template, str):
        raise DataError(
            f"{record.origin}: the tokenizer's chat template must be a string, "
            f"got {type(template).__name__}"
        )
    for turn in turns:
        check_text(turn["content"], record.origin, DataError)
    return render_chat_template(
        template, tokenizer.special_tokens_map, turns, cuts, record.origin, DataError
    )
