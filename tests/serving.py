"""Runs small servers in threads, and talks HTTP to them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import tiny_runs

import prefix_jax as pj
from prefix_jax import artifact, tasks
from prefix_jax.artifact import BackboneCard
from prefix_jax.prefix import KVPrefix, Prefix, Site
from prefix_jax.serve.server import ServeOptions, Server, listen

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TASK = pj.TextTask("{sum}=", "{total}")


def write_model(directory: Path) -> pj.Pretrained:
    """A tiny model that has a chat template."""
    tiny.write_model(directory)
    path = directory / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {"chat_template": CHAT_TEMPLATE}
    path.write_text(json.dumps(content))
    return tiny_runs.on_one_device(directory)


def tune(model: pj.Pretrained, seed: int, length: int = 4, **decode: Any) -> pj.Tuned:
    """A prefix of random slots, which changes every text."""
    geometry, arch = model.backbone.geometry, model.backbone.arch
    shape = geometry.main
    size = (2, shape.layers, length, shape.kv_heads, shape.head_dim)
    slots = 2 * np.random.default_rng(seed).normal(size=size).astype(np.float32)
    produced = Prefix(Site(KVPrefix(*slots)), text_position=length)
    card = artifact.make_card(
        produced,
        geometry,
        BackboneCard(
            source=model.source,
            model_type=arch.model_type,
            fingerprint=model.fingerprint,
            dtype="float32",
        ),
        task={"name": tasks.name_of(TASK), **dataclasses.asdict(TASK)},
        decode=decode,
    )
    return pj.Tuned(model, produced, card)


def make_engine(model: pj.Pretrained) -> pj.Engine:
    """All engines have the same shapes, so that they share compiled programs."""
    return pj.Engine(model, rows=4, decode_steps=4, chunk=32)


@dataclasses.dataclass
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The events of a stream, which must end as OpenAI's do."""
        *events, done, rest = self.content.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@dataclasses.dataclass
class Running:
    """A server that runs."""

    server: Server
    engine: pj.Engine
    loop: asyncio.AbstractEventLoop
    port: int
    thread: threading.Thread
    failures: list[BaseException]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def send(self, method: str, path: str, body: Any = None, key: str | None = None) -> Answer:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        with contextlib.closing(self.connect()) as connection:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body)
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read())

    def get(self, path: str, key: str | None = None) -> Answer:
        return self.send("GET", path, key=key)

    def post(self, path: str, body: Any = None, /, key: str | None = None, **fields: Any) -> Answer:
        return self.send("POST", path, fields if body is None else body, key)

    def complete(self, model: str, prompt: Any = "2+3=", **fields: Any) -> Answer:
        defaults = {"max_tokens": 6, "temperature": 0}
        return self.post("/v1/completions", model=model, prompt=prompt, **defaults | fields)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.server.stop)


@contextlib.contextmanager
def running(engine: pj.Engine, **options: Any) -> Iterator[Running]:
    """Runs a server until the context ends."""
    ready, failures, state = threading.Event(), [], {}

    def run() -> None:
        async def main() -> None:
            state["loop"] = asyncio.get_running_loop()
            state["server"] = Server(engine, ServeOptions(**{"name": "base", **options}))
            await state["server"].run(sock, lambda url, count: ready.set())

        try:
            asyncio.run(main())
        except BaseException as error:
            failures.append(error)
        finally:
            ready.set()

    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        thread = threading.Thread(target=run)
        thread.start()
        ready.wait()
        if failures:
            thread.join()
            raise failures[0]
        server = Running(state["server"], engine, state["loop"], port, thread, failures)
        try:
            yield server
        finally:
            with contextlib.suppress(RuntimeError):
                for _ in range(2):
                    server.stop()
            thread.join()
