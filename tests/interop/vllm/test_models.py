"""Prefixes are model ids of a server: the middleware in front of a fake vLLM."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefix_jax.interop.vllm.plugin.models import PrefixModels
from prefix_jax.interop.vllm.plugin.stored import Prefixes, Shape

BOS = 1


class Server:
    """A fake vLLM that records requests and answers with fixed contents.

    Attributes:
        seen: (path, body) of every request that it got.
        chunks: the events of a streamed answer.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []
        self.chunks: list[bytes] = []

    async def __call__(self, scope, receive, send) -> None:
        content = (await receive())["body"]
        body = json.loads(content) if content.startswith(b"{") else content
        self.seen.append((scope["path"], body))
        status, answer = self.answer(scope["path"], body)
        if answer is None:
            await self._stream(send)
            return
        headers = [(b"content-type", b"application/json"), (b"x-request-id", b"7")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        text = json.dumps(answer).encode()
        # In two pieces, as servers may send it.
        await send({"type": "http.response.body", "body": text[:5], "more_body": True})
        await send({"type": "http.response.body", "body": text[5:]})

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "base"}]}
        if path.endswith("/render"):
            if body.get("messages") == []:
                return 400, {"error": {"message": "no messages"}}
            if path == "/v1/chat/completions/render":
                return 200, {"token_ids": [5, 6, 7]}
            prompts = body["prompt"]
            prompts = prompts if isinstance(prompts, list) else [prompts]
            return 200, [{"token_ids": [5, 6]} for _ in prompts]
        if not isinstance(body, dict) or body.get("model") not in ("base", None):
            return 404, {"error": {"message": "no such model"}}
        if body.get("stream"):
            return 200, None
        return 200, {
            "model": "base",
            "choices": [{"text": "é", "prompt_token_ids": [BOS] * 6 + [5, 6]}],
            "usage": {
                "prompt_tokens": 8,
                "total_tokens": 10,
                "prompt_tokens_details": {"cached_tokens": 7},
            },
        }

    async def _stream(self, send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in self.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class Client:
    """Calls the middleware as a web server does."""

    def __init__(
        self,
        served: Path,
        shape: Shape,
        served_model_name: str | list[str] = "base",
        max_model_len: int = 64,
    ) -> None:
        self.server = Server()
        text = SimpleNamespace(
            num_hidden_layers=shape.layers, hidden_size=shape.hidden, vocab_size=shape.vocab
        )
        model = SimpleNamespace(
            hf_config=SimpleNamespace(bos_token_id=BOS, eos_token_id=2),
            hf_text_config=text,
            get_total_num_kv_heads=lambda: shape.kv_heads,
            get_head_size=lambda: shape.head_dim,
            served_model_name=served_model_name,
            max_model_len=max_model_len,
        )
        transfer = SimpleNamespace(kv_connector_extra_config={"root": str(served)})
        config = SimpleNamespace(model_config=model, kv_transfer_config=transfer)
        self._app = SimpleNamespace(state=SimpleNamespace(vllm_config=config))
        self._middleware = PrefixModels(self.server)
        self.headers: dict[bytes, bytes] = {}

    def raw(self, method: str, path: str, content: bytes, **scope: Any) -> tuple[int, bytes]:
        sent: list[Any] = []
        incoming = iter([{"type": "http.request", "body": content}])

        async def receive() -> Any:
            return next(incoming, {"type": "http.disconnect"})

        async def send(message: Any) -> None:
            sent.append(message)

        scope |= {
            "type": "http", "method": method, "path": path, "app": self._app,
            "headers": [(b"authorization", b"Bearer key"), (b"content-length", b"1")],
        }  # fmt: skip
        asyncio.run(self._middleware(scope, receive, send))
        self.headers = dict(sent[0]["headers"])
        return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        status, content = self.raw("POST", path, json.dumps(body).encode())
        return status, json.loads(content)


@pytest.fixture
def client(served: Path, shape: Shape) -> Client:
    return Client(served, shape)


def test_models_lists_the_prefixes_that_fit(client: Client, served: Path) -> None:
    (served / "broken").mkdir()
    (served / "broken" / "prefix.json").write_text("{")
    status, content = client.raw("GET", "/v1/models", b"")
    models = json.loads(content)["data"]
    assert status == 200
    assert [model["id"] for model in models] == ["base", "six"]
    assert models[1]["parent"] == "base"
    assert models[1]["max_model_len"] == 64 - 6
    assert int(client.headers[b"content-length"]) == len(content)


def test_chat_has_a_placeholder_per_slot_before_the_rendered_prompt(
    client: Client, served: Path
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    status, answer = client.post("/v1/chat/completions", model="six", messages=messages, top_p=0.5)
    (_, rendered), (_, body) = client.server.seen
    assert rendered["model"] == "base"
    assert body["kv_transfer_params"] == {
        "prefix": "six", "prompt_token_ids": [BOS] * 6 + [5, 6, 7]
    }  # fmt: skip
    assert body["cache_salt"] == Prefixes(served)["six"].salt
    assert body["top_p"] == 0.5
    assert (status, answer["model"]) == (200, "six")
    assert client.headers[b"x-request-id"] == b"7"


def test_answer_counts_the_tokens_of_the_text(client: Client) -> None:
    _, answer = client.post("/v1/completions", model="six", prompt="hi")
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["total_tokens"]) == (2, 4)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 1
    assert answer["choices"][0] == {"text": "é", "prompt_token_ids": [5, 6]}


def test_every_prompt_of_a_list_has_placeholders(client: Client) -> None:
    _, answer = client.post("/v1/completions", model="six", prompt=["a", "b"])
    _, body = client.server.seen[-1]
    assert body["prompt"] == [[BOS] * 6 + [5, 6]] * 2
    assert answer["usage"]["prompt_tokens"] == 8 - 12  # the fake counts one prompt


def test_stream_names_the_prefix_wherever_it_is_cut(client: Client) -> None:
    first = {"model": "base", "choices": [{"text": "é"}]}
    usage = {"model": "base", "choices": [], "usage": {"prompt_tokens": 8, "total_tokens": 9}}
    text = b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in (first, usage))
    text += b": comment\n\ndata: [DONE]\n\n"
    for cut in range(1, len(text), 7):
        client.server.chunks = [text[:cut], text[cut:]]
        _, content = client.raw(
            "POST", "/v1/completions", b'{"model": "six", "prompt": "a", "stream": true}'
        )
        events = content.decode().split("\n\n")
        assert json.loads(events[0][6:]) == {"model": "six", "choices": [{"text": "é"}]}
        assert json.loads(events[1][6:])["usage"] == {"prompt_tokens": 2, "total_tokens": 3}
        assert events[2:] == [": comment", "data: [DONE]", ""]


def test_stream_counts_the_prompt_of_each_chunk(client: Client) -> None:
    """Chunks with usage (`continuous_usage_stats`) count one prompt, the last event all."""
    usage = {"prompt_tokens": 8, "total_tokens": 9}
    chunk = {"choices": [{"index": 0, "text": "a"}], "usage": usage}
    last: dict[str, Any] = {"choices": [], "usage": {"prompt_tokens": 16, "total_tokens": 20}}
    client.server.chunks = [b"data: %s\n\n" % json.dumps(x).encode() for x in (chunk, last)]
    body = b'{"model": "six", "prompt": ["a", "b"], "stream": true}'
    _, content = client.raw("POST", "/v1/completions", body)
    usages = [json.loads(event[6:])["usage"] for event in content.decode().split("\n\n")[:-1]]
    assert usages == [
        {"prompt_tokens": 2, "total_tokens": 3},
        {"prompt_tokens": 4, "total_tokens": 8},
    ]


def test_salt_of_a_client_still_separates_its_cache(client: Client, served: Path) -> None:
    client.post("/v1/completions", model="six", prompt="a", cache_salt="tenant")
    _, body = client.server.seen[-1]
    assert body["cache_salt"] == Prefixes(served)["six"].salt + ":tenant"


@pytest.mark.parametrize("path", ["/api/v1/completions", "/v1/completions"])
def test_path_may_begin_with_the_root_path(path: str, client: Client) -> None:
    content = b'{"model": "six", "prompt": "a"}'
    assert client.raw("POST", path, content, root_path="/api")[0] == 200
    assert [path for path, _ in client.server.seen] == ["/v1/completions/render", "/v1/completions"]


def test_name_of_both_a_prefix_and_the_base_model_is_refused(served: Path, shape: Shape) -> None:
    client = Client(served, shape, served_model_name=["base", "six"])
    status, answer = client.post("/v1/completions", model="six", prompt="a")
    assert status == 400
    assert "both a prefix and the base model" in answer["error"]["message"]
    assert client.server.seen == []
    assert client.post("/v1/completions", model="base", prompt="a")[0] == 200


def test_prefix_that_fills_the_context_is_refused(served: Path, shape: Shape) -> None:
    client = Client(served, shape, max_model_len=6)
    status, answer = client.post("/v1/completions", model="six", prompt="a")
    assert status == 400
    assert "has 6 slots, and max_model_len is 6; start vLLM with a" in answer["error"]["message"]
    _, content = client.raw("GET", "/v1/models", b"")
    assert [model["id"] for model in json.loads(content)["data"]] == ["base"]


@pytest.mark.parametrize("depth", [990, 100_000])
def test_deeply_nested_body_is_refused(depth: int, client: Client) -> None:
    content = b'{"model": "six", "prompt": %s}' % (b"[" * depth + b"]" * depth)
    assert client.raw("POST", "/v1/completions", content)[0] == 400
    assert client.server.seen == []


def test_requests_for_other_models_are_unchanged(client: Client) -> None:
    content = b'{"model":"base",  "prompt":"a"}'
    assert client.raw("POST", "/v1/completions", content)[0] == 200
    assert client.post("/v1/completions", model="absent", prompt="a")[0] == 404
    assert client.raw("POST", "/v1/completions", b"not json")[0] == 404
    assert client.raw("POST", "/v1/completions", b"[1]")[0] == 404
    assert client.server.seen[0] == ("/v1/completions", {"model": "base", "prompt": "a"})


def test_unknown_model_is_never_answered_by_the_base_model(client: Client) -> None:
    for name in ("absent", "../six", "six/", "SIX", ""):
        assert client.post("/v1/completions", model=name, prompt="a")[0] == 404


@pytest.mark.parametrize(
    "options",
    [
        {"echo": True}, {"prompt_logprobs": 0}, {"prompt_logprobs": 3}, {"suffix": "x"},
        {"truncate_prompt_tokens": 4}, {"use_beam_search": True}, {"prompt_embeds": "x"},
    ],
)  # fmt: skip
def test_unsupported_options_are_named(options: dict[str, Any], client: Client) -> None:
    status, answer = client.post("/v1/completions", model="six", prompt="a", **options)
    (name,) = options
    assert status == 400
    assert answer["error"]["message"] == f"{name} is not supported with a prefix"
    assert client.server.seen == []


def test_images_are_refused(client: Client) -> None:
    content = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    messages = [{"role": "user", "content": content}]
    status, answer = client.post("/v1/chat/completions", model="six", messages=messages)
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert client.post("/v1/chat/completions", model="six", messages=3)[0] == 200


@pytest.mark.parametrize(
    "reserved",
    [
        {"kv_transfer_params": {"prefix": "six"}},
        {"cache_salt": "prefix:0"},
        {"vllm_xargs": {"kv_transfer_params": {"prefix": "six"}}},
        {"requests": [{"cache_salt": "prefix:0"}]},
    ],
)
@pytest.mark.parametrize("model", ["six", "base"])
def test_clients_cannot_poison_the_cache(
    model: str, reserved: dict[str, Any], client: Client
) -> None:
    assert client.post("/v1/completions", model=model, prompt="a", **reserved)[0] == 400
    assert client.server.seen == []


def test_other_routes_are_refused_but_tokenisation_is_not(client: Client) -> None:
    status, answer = client.post("/v1/responses", model="six", input="a")
    assert status == 400
    assert "/v1/responses does not support prefixes" in answer["error"]["message"]
    assert client.post("/tokenize", model="six", prompt="a")[0] == 200


def test_errors_of_the_server_are_passed_on(client: Client) -> None:
    status, answer = client.post("/v1/chat/completions", model="six", messages=[])
    assert (status, answer["error"]["message"]) == (400, "no messages")


def test_damaged_prefix_is_an_error_of_its_request(client: Client, served: Path) -> None:
    (served / "six" / "prefix.json").write_text("{")
    status, answer = client.post("/v1/completions", model="six", prompt="a")
    assert status == 400
    assert "'six' is damaged" in answer["error"]["message"]
    assert client.post("/v1/completions", model="base", prompt="a")[0] == 200
