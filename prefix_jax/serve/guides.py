"""Tokens as bytes, and guides of the engine that keep a text valid JSON, from llguidance."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import llguidance.hf
import llguidance.numpy
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from transformers import PreTrainedTokenizerFast

from prefix_jax.engine.request import Guide
from prefix_jax.errors import DataError
from prefix_jax.untrusted.tokenizer import decode

# The form of `json.dumps`. If white space were free, small models would continue it forever.
_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Vocabulary:
    """The vocabulary of a tokenizer.

    Args:
        tokenizer: the tokenizer of the model.
        vocab: the number of logits, which may exceed the tokenizer's vocabulary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab: int):
        self._tokenizer, self._vocab = tokenizer, vocab
        # Reading the whole vocabulary needs half a second.
        self._tokens = functools.lru_cache(8)(self._read)

    def bytes_of(self, token: int) -> bytes:
        """Returns the bytes of a token, which may be a part of a character."""
        try:
            return bytes(self._tokens(()).decode_bytes([token]))
        except DataError:
            return decode(self._tokenizer, [token]).encode()

    def json_guide(self, schema: Mapping[str, Any]) -> Callable[[Sequence[int]], Guide]:
        """Returns a function that makes guides from end tokens; see `Request.guide`.

        Raises:
            DataError: the schema is invalid or not supported.
        """
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_FORM)
            error = LLMatcher.validate_grammar(grammar)
        except Exception as failure:  # of its Rust code, which has no class of its own
            error = str(failure)
        if error:
            raise DataError(f"response_format: the JSON schema is not supported: {error:.500}")
        return lambda eos: _JsonGuide(self._tokens(tuple(eos)), grammar, self._vocab)

    def _read(self, eos: tuple[int, ...]) -> LLTokenizer:
        try:
            return llguidance.hf.from_tokenizer(
                self._tokenizer, n_vocab=self._vocab, eos_token=list(eos) or None
            )
        except Exception as failure:  # of its Rust code, which has no class of its own
            raise DataError(
                f"response_format: the model's tokenizer is not supported: {failure!s:.500}"
            ) from None


class _JsonGuide:
    """Follows one text."""

    def __init__(self, tokens: LLTokenizer, grammar: str, vocab: int):
        self._matcher = LLMatcher(tokens, grammar)
        self._words_1W = np.zeros((1, -(-vocab // 32)), np.int32)
        self._check()

    def allowed(self) -> np.ndarray:
        """Returns the allowed tokens as bits."""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._words_1W)
        self._check()
        return self._words_1W[0].view(np.uint32)

    def accept(self, token: int) -> None:
        """Advances by a token."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise DataError(f"response_format: {self._matcher.get_error():.500}")
