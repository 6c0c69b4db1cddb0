"""The simplest honest server of transformers and PEFT that switches prefixes, for `serving.py`.

One adapter per prefix on one model; a request waits for its turn, selects its adapter, and streams
its tokens. PEFT cannot mix prefixes in a batch, so requests run one after the other.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import uvicorn
from peft import PrefixTuningConfig, TaskType
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

# The model is one, and so is the thread that uses it.
TURN = threading.Lock()


def load(directory: Path) -> tuple[Any, Any]:
    """The model with one adapter per prefix, and its tokenizer."""
    model = None
    for path in sorted(directory.glob("*.npz")):
        prefix = dict(np.load(path))
        length = prefix["k_LPKH"].shape[1]
        if model is None:
            model = common.peft_model(prefix, length)
        config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length)
        model.add_adapter(path.stem, config)
        kv_L2PKH = np.stack([prefix["k_LPKH"], prefix["v_LPKH"]], axis=1)
        flat = kv_L2PKH.transpose(2, 0, 1, 3, 4).reshape(length, -1)
        with torch.no_grad():
            model.prompt_encoder[path.stem].embedding.weight.copy_(torch.from_numpy(flat))
    assert model is not None
    model.eval()
    return model, AutoTokenizer.from_pretrained(directory / "tokenizer")


class Tokens(BaseStreamer):
    """Hands new tokens to a function."""

    def __init__(self, receive: Callable[[int], None]):
        self._receive, self._prompt = receive, True

    def put(self, value: Any) -> None:
        if not self._prompt:
            self._receive(int(value))
        self._prompt = False

    def end(self) -> None:
        pass


def make_app(directory: Path) -> Starlette:
    """The application."""
    model, tokenizer = load(directory)

    def generate(body: dict[str, Any], receive: Callable[[int | None], None]) -> None:
        count = body["max_tokens"]
        inputs = tokenizer(body["prompt"], return_tensors="pt")
        with TURN, torch.inference_mode():
            model.set_adapter(body["model"])
            # Without an end token, as the load generator asks.
            model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                streamer=Tokens(receive),
            )
        receive(None)

    async def complete(request: Request) -> StreamingResponse:
        body = await request.json()
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[int | None]()
        send = lambda token: loop.call_soon_threadsafe(queue.put_nowait, token)  # noqa: E731
        threading.Thread(target=generate, args=(body, send)).start()

        async def events() -> AsyncIterator[str]:
            ids = []
            while (token := await queue.get()) is not None:
                ids.append(token)
                text = tokenizer.decode(ids[-1:])
                yield _event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})
            usage = {"completion_tokens": len(ids), "prompt_tokens": 0, "total_tokens": len(ids)}
            yield _event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def health(request: Request) -> Response:
        return Response()

    return Starlette(
        routes=[Route("/v1/completions", complete, methods=["POST"]), Route("/health", health)]
    )


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    uvicorn.run(make_app(Path(sys.argv[1])), port=int(sys.argv[2]), log_level="warning")
