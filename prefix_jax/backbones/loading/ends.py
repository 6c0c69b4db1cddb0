"""End-of-text tokens in the files of a checkpoint, in addition to those of its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefix_jax.backbones.loading.gguf import GGUF
from prefix_jax.errors import BackboneError
from prefix_jax.validation import Count, require

_KEY = "eos_token_id"
# llama.cpp ends a text at any of these: end of text, of a turn, of a message.
_GGUF_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def ends_of_directory(
    path: Path, config: Mapping[str, Any], generation: Mapping[str, Any] | None, vocab: int
) -> tuple[int, ...]:
    """End tokens of a model in Hugging Face layout, read from the file that transformers reads.

    That is `generation_config.json` or, without this file, `config.json` (for a multimodal model
    without a top-level key, its `text_config`).

    Args:
        path: the directory, for messages.
        config: content of `config.json`.
        generation: content of `generation_config.json`; None if there is no such file.
        vocab: see `valid_ids`.

    Raises:
        BackboneError: `eos_token_id` is neither a token id nor a list of token ids.
    """
    if generation is not None:
        return valid_ids(generation.get(_KEY), f"{path / 'generation_config.json'}: {_KEY}", vocab)
    stated, where = config.get(_KEY), _KEY
    inner = config.get("text_config")
    if stated is None and isinstance(inner, Mapping):
        stated, where = inner.get(_KEY), f"text_config.{_KEY}"
    return valid_ids(stated, f"{path / 'config.json'}: {where}", vocab)


def ends_of_gguf(file: GGUF, vocab: int) -> tuple[int, ...]:
    """End tokens of a GGUF file: the ids of its eos, eot and eom tokens.

    Raises:
        BackboneError: one of them is not a token id.
    """
    ids = [file.metadata.get(key, Count, None) for key in _GGUF_KEYS]
    return valid_ids([token for token in ids if token is not None], str(file.path), vocab)


def valid_ids(stated: Any, where: str, vocab: int) -> tuple[int, ...]:
    """Distinct token ids of an `eos_token_id`: null, an id, or a list of ids.

    Ids past the vocabulary are left out. The model cannot generate them, and configurations of
    small models have them (transformers' default for GPT-2 is 50256, whatever the vocabulary).

    Args:
        stated: the value.
        where: file and key, for messages.
        vocab: size of the vocabulary.

    Raises:
        BackboneError: the value is anything else.
    """
    require(stated, Count | list[Count] | None, where, BackboneError)
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    return tuple(token for token in dict.fromkeys(ids) if token < vocab)
