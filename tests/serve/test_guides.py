"""Tests tokens as bytes and guides, also for a tokenizer that llguidance does not support."""

from __future__ import annotations

import bpe
import engines
import numpy as np
import pytest

from prefix_jax.errors import DataError
from prefix_jax.serve.guides import Vocabulary


def allowed(words: np.ndarray) -> set[int]:
    return {*np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))}


def test_tokens_are_bytes_also_inside_characters() -> None:
    tokenizer = bpe.make_tokenizer()
    vocabulary = Vocabulary(tokenizer, 300)
    ids = tokenizer("é {", add_special_tokens=False)["input_ids"]
    assert [vocabulary.bytes_of(token) for token in ids] == [b"\xc3", b"\xa9", b" ", b"{"]


def test_guide_allows_the_end_only_after_a_whole_value() -> None:
    tokenizer = bpe.make_tokenizer()
    # More logits than tokens: models pad their vocabulary.
    guide = Vocabulary(tokenizer, 320).json_guide({"const": 7})((2, 5))
    seven = tokenizer.convert_tokens_to_ids("7")
    assert allowed(guide.allowed()) == {seven}
    guide.accept(seven)
    assert allowed(guide.allowed()) == {2, 5}
    with pytest.raises(DataError, match="response_format"):
        guide.accept(seven)


def test_unsupported_tokenizers_have_texts_but_no_guides() -> None:
    tokenizer = engines.tokenizer()
    vocabulary = Vocabulary(tokenizer, 50)
    assert vocabulary.bytes_of(3) == tokenizer.decode([3]).encode()
    guide = vocabulary.json_guide({"type": "object"})
    with pytest.raises(DataError, match="the model's tokenizer is not supported"):
        guide((1,))
