"""Tokenises rendered examples, marks their targets and applies the length limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from prefix_jax.data.batch import Example
from prefix_jax.data.ends import end_tokens
from prefix_jax.data.template import Rendered
from prefix_jax.errors import ConfigError, DataError
from prefix_jax.untrusted.tokenizer import encodings, token_ids

if TYPE_CHECKING:  # its import takes seconds
    from transformers import PreTrainedTokenizerBase


class Examples(list[Example]):
    """Tokenised examples, with the origins of those that the length limit affected.

    Attributes:
        truncated: origins of the examples whose input was cut.
        dropped: origins of the examples that were left out.
    """

    def __init__(
        self,
        examples: Iterable[Example] = (),
        truncated: Sequence[str] = (),
        dropped: Sequence[str] = (),
    ):
        super().__init__(examples)
        self.truncated = tuple(truncated)
        self.dropped = tuple(dropped)


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


def tokenize(
    rendered: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerBase,
    *,
    loss: Literal["target", "all"] = "target",
    max_length: int | None = None,
    truncate: Literal["left", "right"] = "left",
    on_overflow: Literal["error", "drop"] = "error",
    encoder_decoder: EncoderDecoder | None = None,
    end_ids: Sequence[int] = (),
) -> Examples:
    """Tokenises each segment separately and concatenates them.

    For an encoder-decoder, input and target stay separate.

    Text from templates gets the special tokens that the tokenizer adds before a text, unless it
    already begins with them, and an end-of-sequence token as the last target. Special tokens that
    the tokenizer adds after a text (Llama's with `add_eos_token`) are left out: between input and
    target, they would end the text. In a chat, a turn's targets end with its last end token
    (`end_tokens`), because the line break that templates write after it is never generated. If the
    last turn has no end token, an end-of-sequence token follows it.

    Args:
        rendered: the examples as text.
        tokenizer: a tokenizer from Hugging Face transformers.
        loss: the tokens that are targets: those of "target" segments or "all". The first token of
            an example is never a target.
        max_length: maximum tokens of an example, or of the encoder input; None for no limit.
        truncate: the side on which the input (everything before the first target segment) is cut.
            Targets are never cut.
        on_overflow: "error" or "drop" for an example that does not fit with one input token.
        encoder_decoder: tokenisation options of an encoder-decoder; None for a single stack.
        end_ids: end tokens from the checkpoint (`Architecture.end_ids`), for chats.

    Raises:
        DataError: an example does not fit or has no target; the tokenizer has no end-of-sequence
            token; or the input of an encoder is empty.
        ConfigError: `loss` is "all" for an encoder-decoder.
    """
    if encoder_decoder is not None:
        if loss == "all":
            raise ConfigError(
                "data.loss: all is not supported for an encoder-decoder, which does not predict "
                "its input; use data.loss: target"
            )
        return _two_sided(rendered, tokenizer, encoder_decoder, max_length, truncate, on_overflow)
    ids_of = _ids(rendered, tokenizer)
    before, _ = special_around(tokenizer)
    ends = end_tokens(tokenizer, end_ids, chat=any(item.chat for item in rendered))
    examples, truncated, dropped = [], [], []
    for item in rendered:
        ids: list[int] = []
        if not item.chat:
            ids += missing_start(before, ids_of[item.segments[0].text])
        learnt = [False] * len(ids)
        prompt_length = 0
        for segment in item.segments:
            tokens = ids_of[segment.text]
            if segment.target and not tokens:
                raise DataError(f"{item.source}: the target {segment.text!r} has no tokens")
            if segment.target and not item.chat:
                tokens = [*tokens, tokenizer.eos_token_id]
            end = len(tokens)
            if segment.target and item.chat:
                end = max((i + 1 for i, token in enumerate(tokens) if token in ends), default=0)
                if not end and segment is item.segments[-1]:
                    tokens = [*tokens, _eos(tokenizer)]
                end = end or len(tokens)
            if segment.target:
                prompt_length = len(ids)
            ids += tokens
            learnt += [segment.target and i < end for i in range(len(tokens))]

        start = learnt.index(True)
        kept = 0 if item.chat else min(len(before), start)
        if max_length is not None and len(ids) > max_length:
            room = max_length - (len(ids) - start) - kept
            if room < min(1, start - kept):
                if on_overflow == "drop":
                    dropped.append(item.source)
                    continue
                raise DataError(
                    f"{item.source}: {start} tokens of input and {len(ids) - start} from the first "
                    f"target on exceed max_length {max_length}, even with the input cut to one "
                    "token; raise max_length, or set on_overflow: drop to leave such examples out"
                )
            truncated.append(item.source)
            cut = slice(kept, start - room) if truncate == "left" else slice(kept + room, start)
            prompt_length -= len(ids[cut])
            del ids[cut], learnt[cut]

        target_T = np.array(learnt) if loss == "target" else np.ones(len(ids), bool)
        target_T[0] = False
        if not target_T.any():
            raise DataError(
                f"{item.source}: its only token cannot be a target, because no token precedes it; "
                "give it an input"
            )
        examples.append(
            Example.of_text(
                ids_T=np.array(ids, np.int32),
                target_T=target_T,
                source=item.source,
                task=item.task,
                references=item.references,
                prompt=item.prompt,
                prompt_length=prompt_length,
            )
        )
    if not examples:
        raise DataError(
            f"all {len(rendered)} examples exceed max_length {max_length}; raise max_length"
        )
    return Examples(examples, truncated, dropped)


def _two_sided(
    rendered: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerBase,
    how: EncoderDecoder,
    max_length: int | None,
    truncate: Literal["left", "right"],
    on_overflow: Literal["error", "drop"],
) -> Examples:
    """Tokenises examples for an encoder-decoder: see `tokenize`."""
    ids_of = _ids(rendered, tokenizer)
    before, after = special_around(tokenizer)
    end = [] if tokenizer.eos_token_id in after else [tokenizer.eos_token_id]
    examples, truncated, dropped = [], [], []
    for item in rendered:
        given = [t for s in item.segments if not s.target for t in ids_of[s.text]]
        text = item.segments[-1].text
        if not ids_of[text]:
            raise DataError(f"{item.source}: the target {text!r} has no tokens")
        target = [*before, *ids_of[text], *after, *end]
        room = None if max_length is None else max_length - len(before) - len(after)
        if len(target) > how.max_target or (room is not None and room < min(1, len(given))):
            if on_overflow == "drop":
                dropped.append(item.source)
                continue
            raise DataError(
                f"{item.source}: {len(target)} tokens of target exceed the {how.max_target} that "
                "fit the decoder, and targets are never cut; set on_overflow: drop to leave such "
                "examples out"
                if len(target) > how.max_target
                else f"{item.source}: max_length {max_length} leaves no room for input next to "
                f"{len(before) + len(after)} special tokens; raise max_length"
            )
        if not given and how.source_needed:
            raise DataError(
                f"{item.source}: the input is empty, but an encoder needs at least one token; set "
                "data.input to a template with text or a non-empty field"
            )
        if room is not None and len(given) > room:
            truncated.append(item.source)
            given = given[len(given) - room :] if truncate == "left" else given[:room]
        ids = [how.start_id, *target]
        examples.append(
            Example.of_text(
                ids_T=np.array(ids, np.int32),
                target_T=np.arange(len(ids)) > 0,
                source=item.source,
                task=item.task,
                references=item.references,
                prompt=item.prompt,
                prompt_length=1 + len(before),
                source_ids_S=np.array([*before, *given, *after], np.int32),
            )
        )
    if not examples:
        raise DataError(
            f"all {len(rendered)} examples exceed max_length {max_length} or "
            f"{how.max_target} tokens of target; raise max_length or shorten the targets"
        )
    return Examples(examples, truncated, dropped)


def group_references(examples: Sequence[Example]) -> list[Example]:
    """Merges examples with the same prompt, and their references, for scoring generated text."""
    grouped: dict[str, list[Example]] = {}
    for example in examples:
        grouped.setdefault(example.prompt, []).append(example)
    return [
        dataclasses.replace(
            same[0],
            references=tuple(dict.fromkeys(text for one in same for text in one.references)),
        )
        for same in grouped.values()
    ]


def _ids(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Maps each distinct segment text to its tokens, using one tokenizer call."""
    if not all(item.chat for item in rendered):
        _eos(tokenizer)
    source_of: dict[str, str] = {}
    for item in rendered:
        for segment in item.segments:
            source_of.setdefault(segment.text, item.source)
    encoded = token_ids(tokenizer, list(source_of), list(source_of.values()))
    return dict(zip(source_of, encoded, strict=True))


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
    return int(tokenizer.eos_token_id)


def missing_start(before: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Returns the special tokens to add before a text, or nothing if it begins with them.

    Args:
        before: the special tokens before a text, from `special_around`.
        ids: the tokens of the text. Chat templates write the beginning-of-sequence token
            themselves.
    """
    return [] if [*ids[: len(before)]] == [*before] else [*before]


def special_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns the special tokens that the tokenizer adds before and after a text."""
    (encoding,) = encodings(tokenizer, ["a"], None, "the text 'a'")
    special = encoding.special_tokens_mask
    if 0 not in special:
        raise DataError("the tokenizer returns no tokens for the text 'a'")
    first, last = special.index(0), len(special) - special[::-1].index(0)
    return encoding.ids[:first], encoding.ids[last:]
