"""End tokens: training appends them to targets, and decoding stops at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefix_jax.data.source import Record
from prefix_jax.data.template import render_chat
from prefix_jax.errors import DataError
from prefix_jax.untrusted.tokenizer import decode, token_ids

if TYPE_CHECKING:  # its import takes seconds
    from transformers import PreTrainedTokenizerBase

_PROBE = Record(
    {"chat": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]},
    "the chat template",
)


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, stated: Sequence[int] = (), *, chat: bool = False
) -> tuple[int, ...]:
    """Returns the distinct ids of the tokens that end a text.

    Args:
        tokenizer: a tokenizer from Hugging Face transformers; its eos token comes first.
        stated: end tokens from the checkpoint (`Architecture.end_ids`).
        chat: also return the token that ends an assistant turn in the tokenizer's chat template.
            Gemma's `<end_of_turn>` is not the tokenizer's eos, and some checkpoints do not list it
            in `generation_config.json`.
    """
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    turn = _turn_end(tokenizer) if chat else None
    return tuple(dict.fromkeys([*own, *stated, *([] if turn is None else [turn])]))


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the token that ends an assistant turn; None if the turn ends with plain text."""
    if tokenizer.chat_template is None:
        return None
    try:
        turn = render_chat(_PROBE, "chat", tokenizer).segments[-1].text
    except DataError:  # a template that refuses this chat may accept others
        return None
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for token in reversed(token_ids(tokenizer, [turn], "the chat template")[0]):
        if decode(tokenizer, [token]).strip():
            return int(token) if token in added else None
    return None
