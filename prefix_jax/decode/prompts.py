"""Tokenises and checks prompts before anything is generated."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.data.special import missing_start, special_around
from prefix_jax.errors import ContextError, DataError
from prefix_jax.untrusted.tokenizer import token_ids


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast,
    arch: Architecture,
    prompts: Sequence[str | Sequence[int]],
    names: Sequence[str],
) -> list[list[int]]:
    """Tokenises prompts. A text also gets the special tokens before it and, for an encoder, after
    it; token ids are used unchanged.

    Args:
        tokenizer: a fast tokenizer from Hugging Face transformers.
        arch: the architecture of the model.
        prompts: texts or token ids.
        names: the names of the prompts in error messages.

    Raises:
        DataError: a text cannot be tokenised.
    """
    texts = any(isinstance(prompt, str) for prompt in prompts)
    before, after = special_around(tokenizer) if texts else ([], [])
    encoded = []
    for prompt, name in zip(prompts, names, strict=True):
        if not isinstance(prompt, str):
            encoded.append(list(prompt))
            continue
        # The same tokens as in training: see `tasks.text`.
        (ids,) = token_ids(tokenizer, [prompt], name)
        around = arch.encoder is not None
        encoded.append([*before, *ids, *after] if around else [*missing_start(before, ids), *ids])
    return encoded


def check_prompt(
    arch: Architecture,
    ids: Sequence[int],
    name: str,
    max_new_tokens: int,
    room: int,
    decoder_room: int,
) -> None:
    """Checks that a prompt is valid and fits the model's positions after its prefix.

    Args:
        arch: the architecture of the model.
        ids: the prompt.
        name: its name in error messages.
        max_new_tokens: the maximum number of generated tokens.
        room: the number of tokens of text that fit the stack that reads the prompt.
        decoder_room: the number that fits the decoder; differs from `room` with an encoder.

    Raises:
        DataError: it is empty, or contains a token id outside the vocabulary.
        ContextError: prefix, prompt and new tokens exceed the model's positions.
    """
    has_encoder = arch.encoder is not None
    if has_encoder and max_new_tokens > decoder_room:
        raise ContextError(
            f"max_new_tokens {max_new_tokens} exceeds the {decoder_room} positions that the prefix "
            "leaves to the decoder; lower max_new_tokens"
        )
    if len(ids) == 0:
        raise DataError(f"{name} is empty; it needs at least one token")
    if min(ids) < 0 or max(ids) >= arch.vocab:
        outside = next(token for token in ids if not 0 <= token < arch.vocab)
        raise DataError(
            f"{name} contains token id {outside}, outside the vocabulary (size {arch.vocab})"
        )
    if len(ids) + (0 if has_encoder else max_new_tokens) > room:
        positions = (arch.encoder or arch).max_positions
        raise ContextError(
            f"{name}: {len(ids)} tokens after a prefix of {positions - room}"
            + ("" if has_encoder else f", and {max_new_tokens} new ones,")
            + f" exceed the model's {positions} positions; shorten the prompt"
            + ("" if has_encoder else " or max_new_tokens")
        )
