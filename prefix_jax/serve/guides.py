"""Tokens as bytes, and guides of the engine that keep a text valid JSON, from llguidance."""

from __future__ import annotations

import contextlib
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
from prefix_jax.untrusted.tokenizer import decode, failures

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
        with failures("response_format: the JSON schema is not supported", DataError):
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_FORM)
            if error := LLMatcher.validate_grammar(grammar):
                raise ValueError(error)
        return lambda eos: _JsonGuide(self._tokens(tuple(eos)), grammar, self._vocab)

    def _read(self, eos: tuple[int, ...]) -> LLTokenizer:
        with failures("response_format: the model's tokenizer is not supported", DataError):
            return llguidance.hf.from_tokenizer(
                self._tokenizer, n_vocab=self._vocab, eos_token=list(eos) or None
            )


class _JsonGuide:
    """Follows one text."""

    def __init__(self, tokens: LLTokenizer, grammar: str, vocab: int):
        with _checked():
            self._matcher = LLMatcher(tokens, grammar)
        self._words_1W = np.zeros((1, -(-vocab // 32)), np.int32)
        self._check()

    def allowed(self) -> np.ndarray:
        """Returns the allowed tokens as bits."""
        with _checked():
            llguidance.numpy.fill_next_token_bitmask(self._matcher, self._words_1W)
        self._check()
        return self._words_1W[0].view(np.uint32)

    def accept(self, token: int) -> None:
        """Advances by a token."""
        with _checked():
            self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise DataError(f"response_format: {self._matcher.get_error():.300}")


def _checked() -> contextlib.AbstractContextManager[None]:
    return failures("response_format: the JSON schema cannot be followed", DataError)
