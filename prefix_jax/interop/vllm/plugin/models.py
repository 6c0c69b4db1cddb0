"""ASGI middleware that makes every stored prefix a model id of vLLM's HTTP server.

A request whose `model` is a prefix is rendered by the server itself, with its own chat template,
and sent on to the base model with a placeholder for every slot in front of its tokens. The answer
names the prefix and counts only the tokens of the text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from typing import Any

from .stored import (
    SALT,
    PrefixError,
    Prefixes,
    Shape,
    StoredPrefix,
    UnknownPrefixError,
    placeholder_id,
)

logger = logging.getLogger(f"vllm.{__name__}")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_CHAT, _COMPLETIONS, _MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
# Routes that only tokenise.
_TOKENIZERS = ("/tokenize", "/detokenize")
# Options that vLLM would answer wrongly, or only with the prompt that has placeholders.
_UNSUPPORTED = (
    "prompt_logprobs",
    "echo",
    "suffix",
    "truncate_prompt_tokens",
    "use_beam_search",
    "prompt_embeds",
)
_TEXT_PARTS = ("text", "refusal", "input_text", "output_text")


class BadRequest(Exception):
    """A request that is answered with an error in OpenAI's format."""

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class PrefixModels:
    """The middleware, for `vllm serve --middleware prefix_vllm.models.PrefixModels`."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._server: _Server | None = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._server is None:
            self._server = _Server(self._app, scope["app"].state)
        if scope["method"] == "GET" and _route(scope) == _MODELS:
            await self._server.list_models(scope, receive, send)
        elif scope["method"] == "POST":
            await self._server.post(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _Server:
    """The prefixes of a running server.

    Args:
        app: the application without this middleware.
        state: its state, from which the model and the prefixes' directory are read.
    """

    def __init__(self, app: App, state: Any) -> None:
        config = state.vllm_config
        served = config.model_config.served_model_name
        self._base_names = [served] if isinstance(served, str) else list(served)
        self._app = app
        self._prefixes, self._shape = Prefixes.of(config), Shape.of(config)
        self._placeholder = placeholder_id(config.model_config.hf_config)
        self._max_model_len = config.model_config.max_model_len

    async def list_models(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers `/v1/models` with the server's own models and the prefixes."""
        status, headers, content = await _call(
            self._app, scope, _receive(await _body(receive), receive)
        )
        if status == 200:
            models = json.loads(content)
            usable, errors = self._prefixes.usable(self._shape)
            for error in errors:
                logger.warning("not served: %s", error)
            models["data"] += [
                {
                    "id": prefix.name,
                    "object": "model",
                    "created": prefix.created,
                    "owned_by": "prefix-jax",
                    "root": prefix.digest,
                    "parent": self._base_names[0],
                    "max_model_len": self._max_model_len - prefix.length,
                    "permission": [],
                }
                for prefix in usable
                if prefix.name not in self._base_names and prefix.length < self._max_model_len
            ]
            content = json.dumps(models).encode()
        await _reply(send, status, headers, content)

    async def post(self, scope: Message, receive: Receive, send: Send) -> None:
        """Sends a request on, with the keys and values of its prefix if it names one."""
        content = await _body(receive)
        try:
            body = _parse(content)
            prefix = None if body is None else self._find(body.get("model"))
            if body is None or prefix is None:
                await self._app(scope, _receive(content, receive), send)
            else:
                await self._serve(prefix, body, scope, receive, send)
        except BadRequest as error:
            fault = {
                "message": str(error),
                "type": "BadRequestError",
                "param": error.param,
                "code": error.status,
            }
            await _reply(send, error.status, [], json.dumps({"error": fault}).encode())

    def _find(self, name: Any) -> StoredPrefix | None:
        """Returns the prefix of a model id; None leaves the request to the server.

        The server answers for its own models and LoRA adapters, and unknown ids with a 404.
        """
        if not isinstance(name, str):
            return None
        try:
            prefix = self._prefixes[name]
            if name in self._base_names:
                raise BadRequest(
                    f"{name!r} is both a prefix and the base model; rename the prefix's directory, "
                    "or start vLLM with another --served-model-name",
                    param="model",
                )
            prefix.check(self._shape)
        except UnknownPrefixError:
            return None
        except PrefixError as error:
            raise BadRequest(str(error), param="model") from None
        if prefix.length >= self._max_model_len:
            raise BadRequest(
                f"prefix {name!r} has {prefix.length} slots, and max_model_len is "
                f"{self._max_model_len}; start vLLM with a larger --max-model-len",
                param="model",
            )
        return prefix

    async def _serve(
        self,
        prefix: StoredPrefix,
        body: dict[str, Any],
        scope: Message,
        receive: Receive,
        send: Send,
    ) -> None:
        path = _route(scope)
        base = {**body, "model": self._base_names[0]}
        if path in _TOKENIZERS:
            await self._app(*_request(scope, path, base, receive), send)
            return
        if path not in (_CHAT, _COMPLETIONS):
            raise BadRequest(
                f"{path} does not support prefixes; use {_CHAT} or {_COMPLETIONS}", param="model"
            )
        _check_options(body)
        # The server's own template, tools and special tokens.
        rendered = {key: value for key, value in base.items() if key != "stream_options"}
        rendered["stream"] = False
        status, headers, content = await _call(
            self._app, *_request(scope, f"{path}/render", rendered, receive)
        )
        if status != 200:
            await _reply(send, status, headers, content)
            return
        answer = json.loads(content)
        prompts = [item["token_ids"] for item in (answer if isinstance(answer, list) else [answer])]
        slots = [self._placeholder] * prefix.length
        params: dict[str, Any] = {"prefix": prefix.name}
        base |= {"cache_salt": prefix.salt, "kv_transfer_params": params}
        if salt := body.get("cache_salt"):
            base["cache_salt"] += f":{salt}"
        if path == _CHAT:
            params["prompt_token_ids"] = slots + prompts[0]
        else:
            base["prompt"] = [slots + ids for ids in prompts]
            base["add_special_tokens"] = False
        rewrite = _Rewriter(prefix, len(prompts), send)
        await self._app(*_request(scope, path, base, receive), rewrite)


def _parse(content: bytes) -> dict[str, Any] | None:
    """Returns a body as JSON; None leaves its error to the server."""
    try:
        body = json.loads(content)
        _check_reserved(body)
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _check_reserved(value: Any) -> None:
    """Raises BadRequest if a client sends what only this middleware may send.

    Anyone who could send a prefix's salt without its slots would fill the cache of all its users.
    """
    if isinstance(value, dict):
        if value.get("kv_transfer_params") is not None:
            raise BadRequest(
                "kv_transfer_params is reserved; give the prefix as the model", param="model"
            )
        salt = value.get("cache_salt")
        if isinstance(salt, str) and salt.startswith(SALT):
            raise BadRequest(f"cache_salt must not begin with {SALT!r}", param="cache_salt")
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            if isinstance(item, dict | list):
                _check_reserved(item)


def _check_options(body: dict[str, Any]) -> None:
    """Raises BadRequest for options that do not work with a prefix."""
    for option in _UNSUPPORTED:
        # prompt_logprobs=0 is a request too.
        if body.get(option) not in (None, False, "") or (
            option == "prompt_logprobs" and body.get(option) == 0
        ):
            raise BadRequest(f"{option} is not supported with a prefix", param=option)
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") not in _TEXT_PARTS:
                raise BadRequest(
                    f"content of type {part.get('type')!r} is not supported with a prefix",
                    param="messages",
                )


class _Rewriter:
    """Sends an answer with the prefix's name and the tokens of the text only.

    Args:
        prefix: the prefix that answered.
        prompts: the number of prompts in the request. A chunk of a stream belongs to one of them.
        send: sends to the client.
    """

    def __init__(self, prefix: StoredPrefix, prompts: int, send: Send) -> None:
        self._prefix, self._prompts, self._send = prefix, prompts, send
        self._start: Message = {}
        self._streams = False
        self._rest = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            headers = dict(message["headers"])
            self._streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            if self._streams:
                await self._send(message)
            return
        more = message.get("more_body", False)
        self._rest += message.get("body", b"")
        if self._streams:
            *lines, self._rest = self._rest.split(b"\n")
            out = b"".join(self._line(line) + b"\n" for line in lines)
            if not more:
                out, self._rest = out + self._line(self._rest), b""
            await self._send({**message, "body": out})
        elif not more:
            content = self._json(self._rest)
            await _reply(self._send, self._start["status"], self._start["headers"], content)

    def _line(self, line: bytes) -> bytes:
        data = line.removeprefix(b"data: ")
        return line if data == line or data.strip() == b"[DONE]" else b"data: " + self._json(data)

    def _json(self, content: bytes) -> bytes:
        try:
            answer = json.loads(content)
        except ValueError:
            return content
        if not isinstance(answer, dict):
            return content
        if "model" in answer:
            answer["model"] = self._prefix.name
        usage = answer.get("usage")
        if usage:
            is_chunk = self._streams and answer.get("choices")
            slots = self._prefix.length * (1 if is_chunk else self._prompts)
            usage["prompt_tokens"] -= slots
            usage["total_tokens"] -= slots
            details = usage.get("prompt_tokens_details")
            if details and details.get("cached_tokens"):
                details["cached_tokens"] = max(0, details["cached_tokens"] - slots)
        for holder in (answer, *answer.get("choices", [])):
            if isinstance(holder, dict) and holder.get("prompt_token_ids"):
                holder["prompt_token_ids"] = holder["prompt_token_ids"][self._prefix.length :]
        answer.pop("kv_transfer_params", None)
        return json.dumps(answer, ensure_ascii=False).encode()


# Calls of the application.


def _route(scope: Message) -> str:
    """The path of a request without the server's --root-path, as Starlette routes it."""
    return scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")


async def _body(receive: Receive) -> bytes:
    content = b""
    while True:
        message = await receive()
        content += message.get("body", b"")
        if not message.get("more_body", False):
            return content


def _receive(content: bytes, receive: Receive) -> Receive:
    """Replays a body, and then waits for the client's disconnection."""
    messages: Iterator[Message] = iter([{"type": "http.request", "body": content}])

    async def replay() -> Message:
        return next(messages, None) or await receive()

    return replay


def _request(
    scope: Message, path: str, body: dict[str, Any], receive: Receive
) -> tuple[Message, Receive]:
    """The scope and the messages of a request with another path and body."""
    content = json.dumps(body).encode()
    scope = {
        **scope,
        "path": path,
        "raw_path": path.encode(),
        "headers": _json_headers(scope["headers"], content),
    }
    return scope, _receive(content, receive)


def _json_headers(headers: Iterable[tuple[bytes, bytes]], content: bytes) -> list[Any]:
    kept = [(k, v) for k, v in headers if k not in (b"content-length", b"content-type")]
    length = str(len(content)).encode()
    return [*kept, (b"content-type", b"application/json"), (b"content-length", length)]


async def _call(app: App, scope: Message, receive: Receive) -> tuple[int, list[Any], bytes]:
    """Calls the application and returns the status, the headers and the body of its answer."""
    start: Message = {}
    content = b""

    async def send(message: Message) -> None:
        nonlocal start, content
        if message["type"] == "http.response.start":
            start = message
        else:
            content += message.get("body", b"")

    await app(scope, receive, send)
    return start["status"], start["headers"], content


async def _reply(send: Send, status: int, headers: Iterable[Any], content: bytes) -> None:
    headers = _json_headers(headers, content)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
