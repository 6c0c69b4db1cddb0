"""Requests to the engine, their handles, and the events that report progress."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from prefix_jax.config import DecodeConfig
from prefix_jax.decode.continuation import Continuation, Finish, Generation, Writer
from prefix_jax.errors import PrefixJaxError

# The largest value of `Request.top_logprobs`.
MAX_TOP_LOGPROBS = 20

# The most probable tokens at a position, most probable first: (id, log-probability).
Top = tuple[tuple[int, float], ...]


class Guide(Protocol):
    """Restricts the tokens of a text, for example to those of valid JSON."""

    def allowed(self) -> np.ndarray:
        """Returns the tokens that may come next: bit i % 32 of word i // 32, as uint32 [V / 32]."""

    def accept(self, token: int) -> None:
        """Receives the token that was chosen."""


class Score(NamedTuple):
    """The log-probability of a token of the prompt, and the most probable tokens in its place."""

    logprob: float
    top: Top


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        ids: the tokens of the prompt.
        prefix: the name of its prefix; None for the bare model.
        config: decoding options.
        index: the sampling depends on the seed and on this number; `Generator.generate` uses the
            prompt's position in its list.
        name: the name of the prompt in error messages.
        top_logprobs: the number of most probable tokens to report with every token, at most
            `MAX_TOP_LOGPROBS`.
        score_prompt: whether to report the log-probabilities of the prompt's tokens too.
        guide: makes the guide of each continuation from the tokens that end it; None for free text.
        eos: tokens that end the text, besides those of the prefix or the model.
    """

    ids: Sequence[int]
    prefix: str | None = None
    config: DecodeConfig = DecodeConfig()
    index: int = 0
    name: str = "the prompt"
    top_logprobs: int = 0
    score_prompt: bool = False
    guide: Callable[[Sequence[int]], Guide] | None = None
    eos: tuple[int, ...] = ()


class Handle:
    """A request in the engine.

    Attributes:
        request: the request.
        generation: its result; None until all continuations have ended.
        error: why it failed; None if it has not.
        cancelled: whether it was cancelled.
        prompt_scores: one per token of the prompt but the first, if the request asks for them.
        admitted: the time of `time.monotonic` at which its first continuation got a row; None
            while it waits.
    """

    def __init__(self, request: Request):
        self.request = request
        self.generation: Generation | None = None
        self.error: PrefixJaxError | None = None
        self.cancelled = False
        self.prompt_scores: list[Score] = []
        self.admitted: float | None = None
        self._continuations: dict[int, Continuation] = {}

    @property
    def done(self) -> bool:
        """True once the request has ended, for any reason."""
        return self.generation is not None or self.error is not None or self.cancelled

    def finish(self, sample: int, continuation: Continuation) -> None:
        """Adds a continuation; the last one completes `generation`."""
        self._continuations[sample] = continuation
        if len(self._continuations) == self.request.config.num_samples:
            self.generation = Generation(tuple(c for _, c in sorted(self._continuations.items())))


@dataclasses.dataclass(frozen=True)
class Event:
    """New tokens of a continuation, or the end of one.

    Attributes:
        handle: the request.
        sample: the index of the continuation.
        ids, logprobs: the new tokens and their log-probabilities in nats.
        top: the `top_logprobs` most probable tokens in the place of each.
        text: the text that is now final: often empty, and never the beginning of a stop text.
        finish: why the continuation ended; None while it is running, and if the request failed.
        error: why the request failed; no event of it follows.
    """

    handle: Handle
    sample: int
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top: tuple[Top, ...] = ()
    text: str = ""
    finish: Finish | None = None
    error: PrefixJaxError | None = None


class Sample:
    """A continuation of a request: waiting, or in a row.

    Attributes:
        handle: the request.
        number: the index of the continuation.
        writer: collects its tokens; None while it waits.
        guide: restricts its tokens; None for free text.
        prompt: the tokens that the decoder continues: the prompt, or with an encoder, the start
            token.
        unread: tokens of `prompt` that are not in the cache. The last one stays for decoding.
    """

    def __init__(self, handle: Handle, number: int, start_id: int | None):
        self.handle, self.number = handle, number
        self.writer: Writer | None = None
        self.guide: Guide | None = None
        self.prompt = handle.request.ids if start_id is None else [start_id]
        self.unread = len(self.prompt) - 1
        self._pieces: list[str] = []

    def start(self, writer: Writer, guide: Guide | None) -> None:
        """Records that the continuation has a row."""
        self.writer, self.guide = writer, guide
        if self.handle.admitted is None:
            self.handle.admitted = time.monotonic()

    def next_ids(self, count: int) -> Sequence[int]:
        """The next prompt tokens to read."""
        first = len(self.prompt) - 1 - self.unread
        return self.prompt[first : first + count]

    def add_piece(self, piece: str) -> None:
        """Receives text from the writer."""
        self._pieces.append(piece)

    def score(self, scores: Sequence[Score]) -> None:
        """Records scores of tokens of the prompt, which all continuations share."""
        if self.number == 0:
            self.handle.prompt_scores += scores

    def extend(
        self, ids: Sequence[int], logprobs: Sequence[float], top: Sequence[Top], ended: bool
    ) -> Event:
        """Appends new tokens, up to the first that ends the text.

        Args:
            ids, logprobs, top: the new tokens; `top` is empty if the request does not ask for it.
            ended: whether no more tokens follow.
        """
        assert self.writer is not None
        before = len(self.writer)
        self.writer.extend(ids, logprobs)
        new = len(self.writer) - before
        if self.guide is not None:
            for token in ids[:new]:
                self.guide.accept(token)
        finish: Finish | None = None
        if ended or self.writer.finish is not None:
            continuation = self.writer.close()
            finish = continuation.finish
            self.handle.finish(self.number, continuation)
        text, self._pieces = "".join(self._pieces), []
        return Event(
            handle=self.handle,
            sample=self.number,
            ids=tuple(ids[:new]),
            logprobs=tuple(logprobs[:new]),
            top=tuple(top[:new]),
            text=text,
            finish=finish,
        )


def tops(ids_UX: Any, logprobs_UX: Any, count: int) -> list[Top]:
    """The `count` most probable tokens at every position."""
    pairs = zip(ids_UX.tolist(), logprobs_UX.tolist(), strict=True)
    return [tuple(zip(ids[:count], logprobs[:count], strict=True)) for ids, logprobs in pairs]
