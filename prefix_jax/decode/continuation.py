"""Generation results, and the writer that assembles them token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from prefix_jax.decode.text import TextStream

Finish = Literal["eos", "stop", "length"]


@dataclasses.dataclass(frozen=True)
class Continuation:
    """One generated text.

    Attributes:
        text: without special tokens, and without the stop text that ended it.
        ids: the generated token ids, including an end-of-text token.
        logprobs: the log-probability of each token under the model, before any processor, in nats.
        score: the sum of `logprobs`; with beam search, the score that ranks hypotheses.
        finish: why generation ended: an end-of-text token, a stop text, or the length limit.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: float
    finish: Finish


@dataclasses.dataclass(frozen=True)
class Generation:
    """All continuations of one prompt.

    Attributes:
        samples: the continuations; with beam search, best first.
    """

    samples: tuple[Continuation, ...]

    @property
    def text(self) -> str:
        """The text of the first continuation."""
        return self.samples[0].text


class Writer:
    """Collects one continuation token by token.

    Attributes:
        finish: why the continuation ended; None while it is running.
    """

    def __init__(
        self, stream: TextStream, eos: Sequence[int], on_piece: Callable[[str], None] | None
    ):
        self._stream, self._eos, self._on_piece = stream, eos, on_piece
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self.finish: Finish | None = None

    def __len__(self) -> int:
        """The number of tokens so far."""
        return len(self._ids)

    def extend(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Appends tokens, up to the first one that ends the continuation."""
        for token, logprob in zip(ids, logprobs, strict=True):
            if self.finish is not None:
                return
            self._ids.append(int(token))
            self._logprobs.append(float(logprob))
            if token in self._eos:
                self.finish = "eos"
            else:
                self._emit(self._stream.push(int(token)))
                self.finish = "stop" if self._stream.stopped else None

    def close(self, score: float | None = None) -> Continuation:
        """Returns the finished continuation.

        Args:
            score: None uses the sum of the log-probabilities.
        """
        self._emit(self._stream.finish())
        return Continuation(
            text=self._stream.text,
            ids=tuple(self._ids),
            logprobs=tuple(self._logprobs),
            score=sum(self._logprobs) if score is None else float(score),
            finish=self.finish or "length",
        )

    def _emit(self, piece: str) -> None:
        if piece and self._on_piece is not None:
            self._on_piece(piece)
