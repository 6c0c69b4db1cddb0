"""Streaming detokenisation with stop texts."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from prefix_jax.errors import DataError
from prefix_jax.untrusted.tokenizer import failures


class TextStream:
    """Turns tokens into text piece by piece, up to the first stop text.

    A piece never ends inside a character and never contains the beginning of a possible stop text.
    `text` is always the concatenation of the pieces.

    Attributes:
        text: the text emitted so far.
        stopped: whether a stop text was found; `text` excludes it.
    """

    # Decoding a token may need the tokens before it: SentencePiece drops a leading space.
    _CONTEXT = 8

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stop: Sequence[str]):
        """Starts after a prompt with the token ids `context`."""
        self._tokenizer = tokenizer
        ids = list(context[-self._CONTEXT :])
        self._stream = DecodeStream(ids=ids, skip_special_tokens=True)
        self._stop = stop
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds the next token and returns the text that is now final, often empty."""
        with failures("the generated tokens cannot be decoded", DataError):
            self._held += self._stream.step(self._tokenizer, token) or ""
        positions = [at for at in map(self._held.find, self._stop) if at >= 0]
        if positions:
            self.stopped = True
            return self._let_through(min(positions))
        return self._let_through(len(self._held) - self._doubtful())

    def finish(self) -> str:
        """Returns the text held back; call it after the last token."""
        return "" if self.stopped else self._let_through(len(self._held))

    def _doubtful(self) -> int:
        """Counts the characters at the end that may begin a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0

    def _let_through(self, size: int) -> str:
        piece, self._held = self._held[:size], self._held[size:]
        self.text += piece
        return piece
