"""The routes of the server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from prefix_jax.serve import protocol
from prefix_jax.serve.engine_thread import EngineThread, QueueFullError
from prefix_jax.serve.errors import ApiError, api_error
from prefix_jax.serve.generation import Generation, Job, turns
from prefix_jax.serve.guides import Vocabulary
from prefix_jax.serve.metrics import Metrics
from prefix_jax.serve.models import Model, Models
from prefix_jax.serve.responses import DONE, Responses, sse
from prefix_jax.untrusted.tokenizer import token_ids

B = TypeVar("B", bound=BaseModel)
Handler = Callable[[Request], Awaitable[Response]]

# Clients that need longer to send a body are stuck, or attack the server.
_BODY_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of clients.

    Attributes:
        api_keys: keys for all routes but `/health` and `/metrics`; empty for no keys.
        admin_key: the key that may load and unload prefixes; None forbids it to all.
        request_bytes: the maximum size of a request's body.
        request_seconds: the maximum time of a request.
    """

    api_keys: Sequence[str] = ()
    admin_key: str | None = None
    request_bytes: int = 2**22
    request_seconds: float = 600.0


class App:
    """The application.

    Args:
        engine: the engine, running.
        models: the model ids.
        metrics: receive times and numbers of tokens.
        vocabulary: of the model's tokenizer.
        limits: who may send what.
    """

    def __init__(
        self,
        engine: EngineThread,
        models: Models,
        metrics: Metrics,
        vocabulary: Vocabulary,
        limits: Limits,
    ):
        self._engine, self._models, self._metrics = engine, models, metrics
        self._vocabulary, self._limits = vocabulary, limits
        self._generation = Generation(engine, vocabulary, metrics, limits.request_seconds)

    def starlette(self) -> Starlette:
        """The ASGI application."""
        user, admin = self._with_key(admin=False), self._with_key(admin=True)
        routes = [
            Route("/health", _answer(self._health), methods=["GET"]),
            Route("/metrics", _answer(self._metrics_text), methods=["GET"]),
            Route("/v1/models", _answer(user(self._list_models)), methods=["GET"]),
            Route("/v1/models/{name:path}", _answer(user(self._show_model)), methods=["GET"]),
            Route("/v1/completions", _answer(user(self._completions)), methods=["POST"]),
            Route("/v1/chat/completions", _answer(user(self._chat)), methods=["POST"]),
            Route("/tokenize", _answer(user(self._tokenize)), methods=["POST"]),
            Route("/detokenize", _answer(user(self._detokenize)), methods=["POST"]),
            Route("/tokenizer_info", _answer(user(self._tokenizer_info)), methods=["GET"]),
            Route("/v1/prefixes", _answer(admin(self._list_prefixes)), methods=["GET"]),
            Route("/v1/prefixes", _answer(admin(self._load_prefix)), methods=["POST"]),
            Route(
                "/v1/prefixes/{name:path}", _answer(admin(self._unload_prefix)), methods=["DELETE"]
            ),
        ]
        return Starlette(routes=routes, exception_handlers={404: _not_found, 405: _not_allowed})

    # Answers.

    async def _completions(self, request: Request) -> Response:
        body = await self._body(request, protocol.Completions)
        model = await self._models.find(body.model)
        job = await self._generation.job(body, model)
        texts = [
            prompt if isinstance(prompt, str) else self._engine.engine.decode(prompt)
            for prompt in (body.prompts if body.echo else [])
        ]
        return self._generate(body, job, texts)

    async def _chat(self, request: Request) -> Response:
        body = await self._body(request, protocol.Chat)
        model = await self._models.find(body.model)
        return self._generate(body, await self._generation.job(body, model), [])

    def _generate(
        self, body: protocol.Completions | protocol.Chat, job: Job, texts: Sequence[str]
    ) -> Response:
        responses = Responses(body, job, texts, self._vocabulary)
        if body.stream:
            return _EventStream(lambda: self._events(job, responses))
        return _Whole(lambda: self._whole(job, responses))

    async def _whole(self, job: Job, responses: Responses) -> Any:
        async with self._run(job) as deltas:
            async for delta in deltas:
                responses.add(delta)
        return responses.whole()

    @contextlib.asynccontextmanager
    async def _events(self, job: Job, responses: Responses) -> AsyncIterator[AsyncIterator[bytes]]:
        async def events() -> AsyncIterator[bytes]:
            async for delta in deltas:
                for event in responses.stream(delta):
                    yield event
            for event in responses.end():
                yield event

        async with self._run(job) as deltas:
            yield events()

    @contextlib.asynccontextmanager
    async def _run(self, job: Job) -> AsyncIterator[Any]:
        try:
            async with self._generation.run(job) as deltas:
                yield deltas
        except QueueFullError:
            self._metrics.rejected(job.model.id)
            raise

    # Models.

    async def _list_models(self, request: Request) -> Response:
        models = [self._describe(model) for model in await self._models.all()]
        return JSONResponse({"object": "list", "data": models})

    async def _show_model(self, request: Request) -> Response:
        return JSONResponse(self._describe(await self._models.find(request.path_params["name"])))

    def _describe(self, model: Model) -> dict[str, Any]:
        slots = 0 if model.prefix is None else model.prefix.slots.count
        return {
            "id": model.id,
            "object": "model",
            "created": model.created,
            "owned_by": "prefix-jax",
            "root": self._models.base if model.prefix is None else model.prefix.digest,
            "parent": None if model.prefix is None else self._models.base,
            "max_model_len": self._engine.engine.max_length - slots,
        }

    async def _list_prefixes(self, request: Request) -> Response:
        prefixes = [
            {
                "name": model.id,
                "digest": model.prefix.digest,
                "slots": model.prefix.slots.count,
                "bytes": model.prefix.bytes,
                "tier": model.prefix.tier,
            }
            for model in await self._models.all()
            if model.prefix is not None
        ]
        return JSONResponse({"data": prefixes, "errors": dict(self._models.errors)})

    async def _load_prefix(self, request: Request) -> Response:
        body = await self._body(request, protocol.LoadPrefix)
        return JSONResponse(
            self._describe(await self._models.load(body.name, body.path, body.replace))
        )

    async def _unload_prefix(self, request: Request) -> Response:
        await self._models.unload(request.path_params["name"])
        return Response(status_code=204)

    # The rest.

    async def _tokenize(self, request: Request) -> Response:
        body = await self._body(request, protocol.Tokenize)
        model = await self._models.find(self._models.base if body.model is None else body.model)
        ids = await asyncio.to_thread(self._ids, body)
        content: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": self._describe(model)["max_model_len"],
            "tokens": ids,
        }
        if body.return_token_strs:
            spellings = map(self._vocabulary.bytes_of, ids)
            content["token_strs"] = [spelling.decode(errors="replace") for spelling in spellings]
        return JSONResponse(content)

    def _ids(self, body: protocol.Tokenize) -> list[int]:
        engine = self._engine.engine
        if body.messages is not None:
            return list(engine.request(turns(body.messages)).ids)
        assert body.prompt is not None
        if body.add_special_tokens is False:
            return token_ids(engine.model.tokenizer, [body.prompt], "the prompt")[0]
        return list(engine.request(body.prompt).ids)

    async def _tokenizer_info(self, request: Request) -> Response:
        tokenizer = self._engine.engine.model.tokenizer
        return JSONResponse(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "vocab_size": len(tokenizer),
                "bos_token": tokenizer.bos_token,
                "eos_token": tokenizer.eos_token,
                "pad_token": tokenizer.pad_token,
                "chat_template": tokenizer.chat_template,
            }
        )

    async def _detokenize(self, request: Request) -> Response:
        body = await self._body(request, protocol.Detokenize)
        await self._models.find(self._models.base if body.model is None else body.model)
        return JSONResponse({"prompt": self._engine.engine.decode(body.tokens)})

    async def _health(self, request: Request) -> Response:
        return Response(status_code=200 if self._engine.alive else 503)

    async def _metrics_text(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    # Requests.

    async def _body(self, request: Request, kind: type[B]) -> B:
        """Reads and checks the body of a request.

        Raises:
            ApiError: it is too large, or does not arrive.
            ValidationError: a field is wrong.
        """
        content, most = bytearray(), self._limits.request_bytes
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for piece in request.stream():
                    content += piece
                    if len(content) > most:
                        raise ApiError(413, f"the request has more than {most:,} bytes")
        except TimeoutError:
            raise ApiError(408, "the request did not arrive in time") from None
        return kind.model_validate_json(bytes(content))

    def _with_key(self, *, admin: bool) -> Callable[[Handler], Handler]:
        """Makes a decorator that checks the key of a request."""
        admin_key = self._limits.admin_key
        keys = [*self._limits.api_keys] if not admin else []
        keys += [admin_key] if admin_key and (admin or keys) else []

        def decorate(handler: Handler) -> Handler:
            async def checked(request: Request) -> Response:
                if admin and not keys:
                    raise ApiError(403, "the server runs without an admin key (--admin-key)")
                scheme, _, key = request.headers.get("Authorization", "").partition(" ")
                # Compares with every key, so that the time does not depend on which one matches.
                matches = [hmac.compare_digest(key.encode(), k.encode()) for k in keys]
                if keys and not (scheme.lower() == "bearer" and any(matches)):
                    raise ApiError(
                        401,
                        "wrong or missing API key; send 'Authorization: Bearer KEY'",
                        code="invalid_api_key",
                        headers={"WWW-Authenticate": "Bearer"},
                    )
                return await handler(request)

            return checked

        return decorate


def _answer(handler: Handler) -> Handler:
    """Turns exceptions of a handler into responses."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except Exception as error:
            return _error_response(error)

    return answer


def _error_response(error: BaseException) -> Response:
    converted = api_error(error)
    return JSONResponse(converted.content, converted.status, dict(converted.headers))


async def _not_found(request: Request, error: Exception) -> Response:
    return _error_response(ApiError(404, f"there is no route {request.url.path}"))


async def _not_allowed(request: Request, error: Exception) -> Response:
    return _error_response(ApiError(405, f"{request.url.path} does not accept {request.method}"))


class _ClientGoneError(Exception):
    """The client has closed the connection."""


@contextlib.asynccontextmanager
async def _until_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancels what runs in this context when the client closes the connection.

    Raises:
        _ClientGoneError: it has.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise _ClientGoneError from None
    finally:
        watcher.cancel()


class _Whole(Response):
    """A JSON response whose content is computed while the client waits."""

    def __init__(self, content: Callable[[], Awaitable[Any]]):
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with _until_disconnect(receive):
                response: Response = JSONResponse(await self._content())
        except _ClientGoneError:
            return
        except Exception as error:
            response = _error_response(error)
        await response(scope, receive, send)


class _EventStream(Response):
    """Server-sent events. Errors before the first are an ordinary response, later ones an event."""

    def __init__(self, events: Callable[[], contextlib.AbstractAsyncContextManager[Any]]):
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with _until_disconnect(receive), self._events() as events:
                headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
                async for event in events:
                    if not started:
                        start = {"type": "http.response.start", "status": 200, "headers": headers}
                        await send(start)
                        started = True
                    await _send_body(send, event, more=True)
        except (_ClientGoneError, ConnectionError):
            return
        except Exception as error:
            if not started:
                await _error_response(error)(scope, receive, send)
                return
            await _send_body(send, sse(api_error(error).content) + DONE, more=True)
        await _send_body(send, b"", more=False)


async def _send_body(send: Send, content: bytes, more: bool) -> None:
    await send({"type": "http.response.body", "body": content, "more_body": more})
