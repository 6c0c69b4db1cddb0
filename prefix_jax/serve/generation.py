"""From the fields of a request to the engine, and from its events to deltas."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from prefix_jax.config import DecodeConfig
from prefix_jax.engine import Event, Request
from prefix_jax.engine.request import Score
from prefix_jax.errors import ConfigError
from prefix_jax.serve.engine_thread import EngineThread
from prefix_jax.serve.guides import Vocabulary
from prefix_jax.serve.metrics import Metrics
from prefix_jax.serve.models import Model
from prefix_jax.serve.protocol import Chat, Completions, Message
from prefix_jax.validation import build

# Most new tokens of a chat whose request and prefix do not say.
DEFAULT_CHAT_TOKENS = 512
# OpenAI's default for completions.
DEFAULT_COMPLETION_TOKENS = 16


class Delta(NamedTuple):
    """New tokens of a continuation.

    Attributes:
        prompt: the index of the prompt.
        event: the event of one of its continuations.
    """

    prompt: int
    event: Event


@dataclasses.dataclass
class Job:
    """The requests of one client in the engine.

    Attributes:
        model: the model.
        requests: one per prompt.
        completion_tokens: the number of tokens so far.
        scores: of the prompts' tokens, once they are read.
    """

    model: Model
    requests: Sequence[Request]
    completion_tokens: int = 0
    scores: dict[int, list[Score]] = dataclasses.field(default_factory=dict)

    def add(self, prompt: int, event: Event) -> None:
        """Counts an event."""
        self.completion_tokens += len(event.ids)
        self.scores[prompt] = event.handle.prompt_scores

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens of all prompts, without slots of the prefix."""
        return sum(len(request.ids) for request in self.requests)


class Generation:
    """Generates the answers of all routes.

    Args:
        engine: the engine.
        vocabulary: makes guides for JSON schemas.
        metrics: receive the times and numbers of tokens.
        timeout: the maximum time of a request in seconds.
    """

    def __init__(
        self, engine: EngineThread, vocabulary: Vocabulary, metrics: Metrics, timeout: float
    ):
        self._engine, self._vocabulary = engine, vocabulary
        self._metrics, self._timeout = metrics, timeout

    async def job(self, body: Completions | Chat, model: Model) -> Job:
        """Renders, tokenises and checks the prompts of a request.

        Raises:
            PrefixJaxError: a prompt or an option is invalid.
        """
        prompts = len(body.prompts) if isinstance(body, Completions) else 1
        best_of = body.best_of if isinstance(body, Completions) else None
        continuations = prompts * (best_of or body.n)
        if continuations > self._engine.capacity:
            raise ConfigError(
                f"the request asks for {continuations:,} continuations, and the server allows "
                f"{self._engine.capacity:,} of all clients; send several smaller requests"
            )
        # In a thread: rendering and tokenising a long text must not delay other requests.
        return await asyncio.to_thread(self._job, body, model)

    def _job(self, body: Completions | Chat, model: Model) -> Job:
        engine, prefix = self._engine.engine, None if model.prefix is None else model.id
        if isinstance(body, Chat):
            prompts: Sequence[Any] = [turns(body.messages)]
            names = ["the chat"]
            top_logprobs, score = (body.top_logprobs or 0) if body.logprobs else 0, False
        else:
            prompts = body.prompts
            names = [
                "the prompt" if len(prompts) == 1 else f"prompt {i}" for i in range(len(prompts))
            ]
            top_logprobs, score = body.logprobs or 0, body.echo and body.logprobs is not None
        guide = None
        if body.response_format is not None:
            schema = body.response_format.schema_of_answer
            guide = None if schema is None else self._vocabulary.json_guide(schema)
        requests = []
        for index, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
            request = engine.request(prompt, prefix, index=index, name=name)
            config = decode_config(body, model, engine.room(request))
            request = dataclasses.replace(
                request, config=config, top_logprobs=top_logprobs, score_prompt=score, guide=guide
            )
            engine.check(request)
            requests.append(request)
        return Job(model, requests)

    @contextlib.asynccontextmanager
    async def run(self, job: Job) -> AsyncIterator[AsyncIterator[Delta]]:
        """Runs the requests of a job, and cancels them when the context ends.

        Raises:
            QueueFullError, EngineStoppedError, PrefixJaxError: see `EngineThread.generate`.
            TimeoutError: the request exceeds its time.
        """
        timing = self._metrics.start(job.model.id, job.prompt_tokens)
        answered = False

        async def deltas(events: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[Delta]:
            nonlocal answered
            async for index, event in events:
                job.add(index, event)
                timing.event(index, event)
                yield Delta(index, event)
            answered = True

        try:
            async with (
                asyncio.timeout(self._timeout),
                self._engine.generate(job.requests) as events,
            ):
                yield deltas(events)
        finally:
            timing.end(answered)


def turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The messages of a chat as templates want them."""
    # Templates know only the older name of the role.
    return [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.text,
        }
        for message in messages
    ]


def decode_config(body: Completions | Chat, model: Model, room: int) -> DecodeConfig:
    """Decoding options: those of the request, of the prefix, or OpenAI's defaults, in this order.

    Args:
        body: the request.
        model: the model.
        room: the number of new tokens that fit after the prompt.

    Raises:
        ConfigError: the options contradict each other.
    """
    stored = {} if model.prefix is None else dict(model.prefix.card.decode)
    for name in ("num_beams", "length_penalty", "early_stopping"):  # the engine has no beams
        stored.pop(name, None)
    is_chat = isinstance(body, Chat)
    default_tokens = DEFAULT_CHAT_TOKENS if is_chat else DEFAULT_COMPLETION_TOKENS
    values: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": default_tokens, **stored}
    given = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "min_new_tokens": body.min_tokens,
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop,
    }
    values |= {name: value for name, value in given.items() if value is not None}
    off = {"top_p": (1,), "top_k": (-1, 0), "min_p": (0,)}
    for name, nothing in off.items():
        if values["temperature"] == 0 or values.get(name) in nothing:
            values[name] = None
    limit = body.max_tokens
    if isinstance(body, Chat) and body.max_completion_tokens is not None:
        limit = body.max_completion_tokens
    # A limit that the client does not give never makes its request fail.
    values["max_new_tokens"] = (
        max(1, min(values["max_new_tokens"], room)) if limit is None else max(1, limit)
    )
    if body.ignore_eos:
        values["min_new_tokens"] = values["max_new_tokens"]
    elif limit is None:
        values["min_new_tokens"] = min(values.get("min_new_tokens", 0), values["max_new_tokens"])
    best_of = body.best_of if isinstance(body, Completions) else None
    values["num_samples"] = best_of or body.n
    if values["temperature"] == 0 and values["num_samples"] > 1:
        raise ConfigError(
            f"n {body.n} needs a temperature above 0: without it, all choices are identical"
        )
    values["seed"] = secrets.randbits(32) if body.seed is None else body.seed % 2**32
    return build(DecodeConfig, values)
