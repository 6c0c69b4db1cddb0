"""Special tokens of a tokenizer: those around a text, and those that end one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefix_jax.errors import DataError
from prefix_jax.untrusted.tokenizer import encodings

if TYPE_CHECKING:  # its import takes seconds
    from transformers import PreTrainedTokenizerBase


def special_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns the special tokens that the tokenizer adds before and after a text."""
    (encoding,) = encodings(tokenizer, ["a"], None, "the text 'a'")
    special = encoding.special_tokens_mask
    if 0 not in special:
        raise DataError("the tokenizer returns no tokens for the text 'a'")
    first, last = special.index(0), len(special) - special[::-1].index(0)
    return encoding.ids[:first], encoding.ids[last:]


def missing_start(before: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Returns the special tokens to add before a text, or nothing if it begins with them.

    Args:
        before: the special tokens before a text, from `special_around`.
        ids: the tokens of the text. Chat templates write the beginning-of-sequence token
            themselves.
    """
    return [] if [*ids[: len(before)]] == [*before] else [*before]


def eos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of the end-of-sequence token.

    Raises:
        DataError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
    return int(tokenizer.eos_token_id)


def end_tokens(tokenizer: PreTrainedTokenizerBase, stated: Sequence[int] = ()) -> tuple[int, ...]:
    """Returns the distinct ids of the tokens that end a text.

    Args:
        tokenizer: a tokenizer from Hugging Face transformers; its eos token comes first.
        stated: end tokens from the checkpoint (`Architecture.end_ids`).
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(dict.fromkeys([*eos, *stated]))
