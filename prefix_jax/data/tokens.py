"""Text → tokens: what is given, what is learnt, and what happens when it is too long."""

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
    """Tokenised examples, and what the length limit did to the others.

    Attributes:
        truncated: sources of the examples whose input was cut.
        dropped: sources of the examples that were left out.
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
    """How text becomes tokens for an encoder-decoder.

    The input goes to the encoder, and the target to the decoder, behind its start token; each with
    the special tokens that the tokenizer writes around a text. These are the labels of
    transformers: T5's end with </s>, BART's begin with <s> as well.

    Attributes:
        start_id: the token that the decoder begins with.
        max_target: tokens of a target at most, special ones counted.
        source_needed: whether an input without any token is an error. It is not where soft tokens
            stand before it.
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
    """Tokenises each segment apart and joins them, or keeps input and target apart for an
    encoder-decoder.

    Text from templates gets the special tokens that the tokenizer itself would write before it, if
    any and unless it begins with them, and an end-of-sequence token as the last target. What the
    tokenizer would write after a text (Llama's with `add_eos_token`) is left out: in the middle,
    between input and target, it would end the text. In a chat, a turn's targets end with
    its last end token (`end_tokens`): the line break that templates put after it is never
    generated. If the last turn has none, an end-of-sequence token follows it.

    Args:
        rendered: the examples as text.
        tokenizer: of Hugging Face transformers.
        loss: which tokens are targets, those of target segments or "all". The first token of an
            example never is one.
        max_length: tokens of an example at most, or of what an encoder reads; None sets no limit.
        truncate: the side at which the input (what stands before the first target segment) is cut
            to fit. Targets are never cut.
        on_overflow: what to do with an example that does not fit with one token of its input.
        encoder_decoder: what an encoder-decoder needs; None for a single stack.
        end_ids: end tokens that the checkpoint states (`Architecture.end_ids`), for chats.

    Raises:
        DataError: an example does not fit, or no target is left of it; the tokenizer has no
            end-of-sequence token; an encoder would have nothing to read.
        ConfigError: an encoder-decoder is to learn what it only reads.
    """
    if encoder_decoder is not None:
        if loss == "all":
            raise ConfigError(
                "data.loss: all learns the input too, which the encoder of this model only reads; "
                "take data.loss: target"
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
                raise DataError(f"{item.source}: the tokenizer makes no token of {segment.text!r}")
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
                    f"target on do not fit max_length {max_length}, even with the input cut to one "
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
                f"{item.source}: its one token cannot be a target, as nothing stands before it; "
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
        raise DataError(f"none of {len(rendered)} examples fits max_length {max_length}; raise it")
    return Examples(examples, truncated, dropped)


def _two_sided(
    rendered: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerBase,
    how: EncoderDecoder,
    max_length: int | None,
    truncate: Literal["left", "right"],
    on_overflow: Literal["error", "drop"],
) -> Examples:
    """Examples for an encoder-decoder: see `tokenize`."""
    ids_of = _ids(rendered, tokenizer)
    before, after = special_around(tokenizer)
    end = [] if tokenizer.eos_token_id in after else [tokenizer.eos_token_id]
    examples, truncated, dropped = [], [], []
    for item in rendered:
        given = [t for s in item.segments if not s.target for t in ids_of[s.text]]
        text = item.segments[-1].text
        if not ids_of[text]:
            raise DataError(f"{item.source}: the tokenizer makes no token of {text!r}")
        target = [*before, *ids_of[text], *after, *end]
        room = None if max_length is None else max_length - len(before) - len(after)
        if len(target) > how.max_target or (room is not None and room < min(1, len(given))):
            if on_overflow == "drop":
                dropped.append(item.source)
                continue
            raise DataError(
                f"{item.source}: {len(target)} tokens of target exceed the {how.max_target} that "
                "fit the decoder, and a target is never cut; set on_overflow: drop to leave such "
                "examples out"
                if len(target) > how.max_target
                else f"{item.source}: not one token of input fits max_length {max_length} beside "
                f"{len(before) + len(after)} special ones; raise max_length"
            )
        if not given and how.source_needed:
            raise DataError(
                f"{item.source}: the input is empty, and an encoder needs something to read; give "
                "data.input, a template with text or a field that is not empty"
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
            f"none of {len(rendered)} examples fits max_length {max_length} and "
            f"{how.max_target} tokens of target; raise max_length or shorten the targets"
        )
    return Examples(examples, truncated, dropped)


def group_references(examples: Sequence[Example]) -> list[Example]:
    """One example for each prompt, with the references of all: what generation is scored on."""
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
    """Text of a segment → its tokens, each text once and all in one call."""
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
    """The special tokens to write before a text for a single stack: none if it has them.

    Args:
        before: of `special_around`.
        ids: tokens of the text. Chat templates write the beginning-of-sequence token themselves.
    """
    return [] if [*ids[: len(before)]] == [*before] else [*before]


def special_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer writes before and after a text."""
    (encoding,) = encodings(tokenizer, ["a"], None, "the text 'a'")
    special = encoding.special_tokens_mask
    if 0 not in special:
        raise DataError("the tokenizer makes no token of the text 'a'")
    first, last = special.index(0), len(special) - special[::-1].index(0)
    return encoding.ids[:first], encoding.ids[last:]
