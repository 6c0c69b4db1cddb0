"""Responses in OpenAI's format."""

from __future__ import annotations

import dataclasses
import itertools
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from prefix_jax.decode.continuation import Finish
from prefix_jax.engine import Event
from prefix_jax.engine.request import Score, Top
from prefix_jax.serve.generation import Delta, Job
from prefix_jax.serve.guides import Vocabulary
from prefix_jax.serve.protocol import Chat, Completions

DONE = b"data: [DONE]\n\n"

_FINISH = {"eos": "stop", "stop": "stop", "length": "length", None: None}


@dataclasses.dataclass
class _Tokens:
    """Tokens, their log-probabilities (None if unknown), and the most probable in their place."""

    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float | None] = dataclasses.field(default_factory=list)
    top: list[Top] = dataclasses.field(default_factory=list)

    def extend(
        self, ids: Sequence[int], logprobs: Sequence[float | None], top: Sequence[Top]
    ) -> None:
        """Appends tokens."""
        self.ids += ids
        self.logprobs += logprobs
        self.top += top


@dataclasses.dataclass
class _Choice:
    """A continuation while it is collected."""

    text: str = ""
    tokens: _Tokens = dataclasses.field(default_factory=_Tokens)
    finish: Finish | None = None

    def add(self, event: Event) -> None:
        """Appends new tokens."""
        self.text += event.text
        self.tokens.extend(event.ids, event.logprobs, event.top)
        self.finish = event.finish

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of its tokens."""
        logprobs = [value for value in self.tokens.logprobs if value is not None]
        return sum(logprobs) / max(1, len(logprobs))


class Responses:
    """Builds the responses to one request.

    Args:
        body: the request.
        job: its prompts.
        texts: the text of each prompt, for `echo`.
        vocabulary: the vocabulary of the model.
    """

    def __init__(
        self,
        body: Completions | Chat,
        job: Job,
        texts: Sequence[str],
        vocabulary: Vocabulary,
    ):
        self._body, self._job, self._texts, self._vocabulary = body, job, texts, vocabulary
        self._is_chat = isinstance(body, Chat)
        self._echo = isinstance(body, Completions) and body.echo
        self._nothing_new = self._echo and body.max_tokens == 0
        self._logprobs = body.logprobs is not None and body.logprobs is not False
        kind = "chatcmpl" if self._is_chat else "cmpl"
        self._id, self._created = f"{kind}-{secrets.token_hex(12)}", int(time.time())
        self._choices: dict[tuple[int, int], _Choice] = {}
        # The indices of the choices whose stream has begun.
        self._started: set[int] = set()
        # The number of characters that a choice's log-probabilities have covered.
        self._offsets: dict[int, int] = {}

    def add(self, delta: Delta) -> None:
        """Collects a delta, for `whole`."""
        key = delta.prompt, delta.event.sample
        self._choices.setdefault(key, _Choice()).add(delta.event)

    def whole(self) -> dict[str, Any]:
        """The response, once all deltas are collected."""
        choices: list[dict[str, Any]] = []
        for prompt, group in itertools.groupby(sorted(self._choices), key=lambda key: key[0]):
            samples = [self._choices[key] for key in group]
            if len(samples) > self._body.n:  # best_of
                samples.sort(key=lambda choice: choice.mean_logprob, reverse=True)
            for choice in samples[: self._body.n]:
                choices.append(self._choice(len(choices), prompt, choice))
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._header(kind), "choices": choices, "usage": self._usage()}

    def stream(self, delta: Delta) -> Iterator[bytes]:
        """The events of a delta, none if nothing is new."""
        prompt, event = delta
        index = prompt * self._body.n + event.sample
        first = index not in self._started
        self._started.add(index)
        if first and self._is_chat:
            yield self._event({"index": index, "delta": {"role": "assistant", "content": ""}})
        if first and self._echo:
            tokens = self._prompt_tokens(prompt)
            yield self._event(self._text_chunk(index, self._texts[prompt], tokens))
        finish, text, tokens = _FINISH[event.finish], event.text, _Tokens()
        tokens.extend(event.ids, event.logprobs, event.top)
        if self._nothing_new:
            text, tokens = "", _Tokens()
        if not (text or finish or (self._logprobs and tokens.ids)):
            return
        if self._is_chat:
            content = {"content": text} if text else {}
            chunk = {"index": index, "delta": content, "finish_reason": finish}
            if self._logprobs:
                chunk["logprobs"] = self._chat_logprobs(tokens)
            yield self._event(chunk)
        else:
            yield self._event(self._text_chunk(index, text, tokens, finish))

    def end(self) -> Iterator[bytes]:
        """The events at the end of a stream."""
        options = self._body.stream_options
        if options is not None and options.include_usage:
            kind = "chat.completion.chunk" if self._is_chat else "text_completion"
            yield sse({**self._header(kind), "choices": [], "usage": self._usage()})
        yield DONE

    def _header(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._job.model.id,
        }

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self._job.prompt_tokens, self._job.completion_tokens
        if self._nothing_new:
            completion = 0
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _choice(self, index: int, prompt: int, choice: _Choice) -> dict[str, Any]:
        finish = _FINISH[choice.finish]
        if self._is_chat:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            logprobs = self._chat_logprobs(choice.tokens) if self._logprobs else None
            return {
                "index": index,
                "message": message,
                "logprobs": logprobs,
                "finish_reason": finish,
            }
        text, tokens = choice.text, choice.tokens
        if self._nothing_new:
            text, tokens = "", _Tokens()
        if self._echo:
            text = self._texts[prompt] + text
            before = self._prompt_tokens(prompt)
            before.extend(tokens.ids, tokens.logprobs, tokens.top)
            tokens = before
        return self._text_chunk(index, text, tokens, finish)

    def _text_chunk(
        self, index: int, text: str, tokens: _Tokens, finish: str | None = None
    ) -> dict[str, Any]:
        logprobs = self._text_logprobs(index, tokens) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _prompt_tokens(self, prompt: int) -> _Tokens:
        """The tokens of a prompt; nothing precedes the first one that could predict it."""
        scores: list[Score] = self._job.scores.get(prompt, [])
        ids = list(self._job.requests[prompt].ids)
        logprobs = [score.logprob for score in scores]
        return _Tokens(ids, [None, *logprobs], [(), *(score.top for score in scores)])

    def _text_logprobs(self, index: int, tokens: _Tokens) -> dict[str, Any]:
        texts = [self._text(token) for token in tokens.ids]
        start = self._offsets.get(index, 0)
        lengths = itertools.accumulate((len(text) for text in texts), initial=start)
        *offsets, self._offsets[index] = lengths
        return {
            "tokens": texts,
            "token_logprobs": tokens.logprobs,
            "top_logprobs": [
                None if value is None else {self._text(token): prob for token, prob in top}
                for value, top in zip(tokens.logprobs, tokens.top, strict=True)
            ],
            "text_offset": offsets,
        }

    def _chat_logprobs(self, tokens: _Tokens) -> dict[str, Any]:
        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            spelling = self._vocabulary.bytes_of(token)
            return {
                "token": spelling.decode(errors="replace"),
                "logprob": logprob,
                "bytes": list(spelling),
            }

        columns = zip(tokens.ids, tokens.logprobs, tokens.top, strict=True)
        content = [
            {**entry(token, logprob), "top_logprobs": [entry(*pair) for pair in top]}
            for token, logprob, top in columns
        ]
        return {"content": content, "refusal": None}

    def _text(self, token: int) -> str:
        return self._vocabulary.bytes_of(token).decode(errors="replace")

    def _event(self, choice: dict[str, Any]) -> bytes:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        choice = {"logprobs": None, "finish_reason": None, **choice}
        return sse({**self._header(kind), "choices": [choice]})


def sse(content: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"
