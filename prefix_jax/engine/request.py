"""Requests to the engine, their handles, and the events that report progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from prefix_jax.config import DecodeConfig
from prefix_jax.decode.continuation import Continuation, Finish, Generation, Writer
from prefix_jax.errors import PrefixJaxError


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
    """

    ids: Sequence[int]
    prefix: str | None = None
    config: DecodeConfig = DecodeConfig()
    index: int = 0
    name: str = "the prompt"


class Handle:
    """A request in the engine.

    Attributes:
        request: the request.
        generation: its result; None until all continuations have ended.
        error: why it failed; None if it has not.
        cancelled: whether it was cancelled.
    """

    def __init__(self, request: Request):
        self.request = request
        self.generation: Generation | None = None
        self.error: PrefixJaxError | None = None
        self.cancelled = False
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
        text: the text that is now final: often empty, and never the beginning of a stop text.
        finish: why the continuation ended; None while it is running, and if the request failed.
        error: why the request failed; no event of it follows.
    """

    handle: Handle
    sample: int
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    text: str = ""
    finish: Finish | None = None
    error: PrefixJaxError | None = None


class Sample:
    """A continuation of a request: waiting, or in a row.

    Attributes:
        handle: the request.
        number: the index of the continuation.
        writer: collects its tokens; None while it waits.
        prompt: the tokens that the decoder continues: the prompt, or with an encoder, the start
            token.
        unread: tokens of `prompt` that are not in the cache. The last one stays for decoding.
    """

    def __init__(self, handle: Handle, number: int, start_id: int | None):
        self.handle, self.number = handle, number
        self.writer: Writer | None = None
        self.prompt = handle.request.ids if start_id is None else [start_id]
        self.unread = len(self.prompt) - 1
        self._pieces: list[str] = []

    def next_ids(self, count: int) -> Sequence[int]:
        """The next prompt tokens to read."""
        first = len(self.prompt) - 1 - self.unread
        return self.prompt[first : first + count]

    def add_piece(self, piece: str) -> None:
        """Receives text from the writer."""
        self._pieces.append(piece)

    def extend(self, ids: Sequence[int], logprobs: Sequence[float], ended: bool) -> Event:
        """Appends new tokens, up to the first that ends the text.

        Args:
            ids, logprobs: the new tokens.
            ended: whether no more tokens follow.
        """
        assert self.writer is not None
        before = len(self.writer)
        self.writer.extend(ids, logprobs)
        new = len(self.writer) - before
        finish: Finish | None = None
        if ended or self.writer.finish is not None:
            continuation = self.writer.close()
            finish = continuation.finish
            self.handle.finish(self.number, continuation)
        text, self._pieces = "".join(self._pieces), []
        return Event(
            self.handle, self.number, tuple(ids[:new]), tuple(logprobs[:new]), text, finish
        )
