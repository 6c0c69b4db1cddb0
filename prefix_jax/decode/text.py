"""Tokens → text, as it is generated."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from prefix_jax.errors import DataError
from prefix_jax.untrusted.tokenizer import failures


class TextStream:
    """Turns tokens into text piece by piece, up to the first stop text.

    Pieces never end within a character and never hold the beginning of what may yet become a stop
    text. `text` is always what the pieces make together.

    Attributes:
        text: what was let through so far.
        stopped: whether a stop text was found; it is cut off.
    """

    # A token may need those before it to become text: a leading space, in SentencePiece.
    _CONTEXT = 8

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stop: Sequence[str]):
        """Starts after the prompt whose token ids are `context`."""
        self._tokenizer = tokenizer
        ids = list(context[-self._CONTEXT :])
        self._stream = DecodeStream(ids=ids, skip_special_tokens=True)
        self._stop = stop
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes the next token and returns the text that is now certain, often none."""
        with failures("the generated tokens cannot be decoded", DataError):
            self._held += self._stream.step(self._tokenizer, token) or ""
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._let_through(min(found))
        return self._let_through(len(self._held) - self._doubtful())

    def finish(self) -> str:
        """Returns what was held back, as no more tokens come."""
        return "" if self.stopped else self._let_through(len(self._held))

    def _doubtful(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0

    def _let_through(self, size: int) -> str:
        piece, self._held = self._held[:size], self._held[size:]
        self.text += piece
        return piece
