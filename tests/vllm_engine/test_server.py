"""vLLM's HTTP server with prefixes, through the client of OpenAI."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support import NAMES, NEW_TOKENS, QUESTIONS, swap

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": NEW_TOKENS}


@pytest.fixture(scope="module")
def url(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    served = directory / "served"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Equivalent to `vllm serve`, a command that the wheel for CPUs does not have.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(served / "model"), "--config", str(served / "vllm.yaml")]
    command += ["--served-model-name", "base", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "512", "--block-size", "32", "--enforce-eager"]
    command += ["--enable-prompt-tokens-details", "--api-key", "secret"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ)
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            httpx.get(f"{url}/health").raise_for_status()
            break
        except httpx.HTTPError:
            assert server.poll() is None, log.read_text()[-4000:]
            time.sleep(1)
    else:
        raise AssertionError(log.read_text()[-4000:])
    yield url
    server.terminate()
    server.wait(60)


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=300)


def model(name: str) -> str:
    return "base" if name == "none" else name


def test_every_prefix_is_a_model(client: openai.OpenAI) -> None:
    assert [x.id for x in client.models.list()] == ["base", "code", "cook", "pirate", "poet"]


@pytest.mark.parametrize("name", NAMES)
def test_completions_equal_those_of_prefix_jax(name: str, client, expected) -> None:
    """A list of prompts; tokens are compared, because texts may cut a character."""
    prompts = [f"{question}\n" for question in QUESTIONS]
    answer = client.completions.create(
        model=model(name), prompt=prompts, extra_body={"return_token_ids": True}, **GREEDY
    )
    for choice, prompt, wanted in zip(
        answer.choices, expected["prompts"], expected["answers"][name], strict=True
    ):
        assert choice.token_ids == wanted["ids"]
        assert choice.prompt_token_ids == prompt
    assert answer.model == model(name)
    assert answer.usage.prompt_tokens == sum(map(len, expected["prompts"]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [0, 4])
def test_chats_equal_those_of_prefix_jax(name: str, number: int, client, expected) -> None:
    messages = [{"role": "user", "content": QUESTIONS[number]}]
    answer = client.chat.completions.create(
        model=model(name),
        messages=messages,
        extra_body={"return_token_ids": True},
        **GREEDY,
    )
    assert answer.choices[0].token_ids == expected["chats"][name][number]["ids"]
    events = list(
        client.chat.completions.create(
            model=model(name),
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    text = "".join(x.choices[0].delta.content or "" for x in events if x.choices)
    assert text == answer.choices[0].message.content
    assert {x.model for x in events} == {model(name)}
    assert events[-1].usage.prompt_tokens == answer.usage.prompt_tokens


def test_answer_follows_a_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="cook",
        messages=[{"role": "user", "content": QUESTIONS[0]}],
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        temperature=0,
        max_tokens=40,
    )
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, {"model": "absent"}),
        (404, {"model": "../pirate"}),
        (400, {"echo": True}),
        (400, {"prompt_logprobs": 0}),
        (400, {"suffix": "x"}),
        (400, {"use_beam_search": True}),
        (400, {"cache_salt": "prefix:0"}),
        (400, {"model": "base", "cache_salt": "prefix:0"}),
        (400, {"model": "base", "kv_transfer_params": {"prefix": "pirate"}}),
        (400, {"model": "base", "vllm_xargs": {"kv_transfer_params": {"prefix": "pirate"}}}),
        (400, {"max_tokens": -1}),
        (400, {"prompt": "moon " * 600}),
        (400, {"prompt": None}),
    ],
)
def test_wrong_requests_are_answered_with_the_shape_of_openai(
    status: int, body: dict[str, Any], url: str
) -> None:
    request = {"model": "pirate", "prompt": "Ahoy", "max_tokens": 4} | body
    headers = {"authorization": "Bearer secret"}
    answer = httpx.post(f"{url}/v1/completions", json=request, headers=headers, timeout=60)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_key_is_required_for_prefixes_too(url: str) -> None:
    body = {"model": "pirate", "prompt": "Ahoy"}
    assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
    assert httpx.get(f"{url}/v1/models").status_code == 401


def test_prefix_replaced_under_load_is_never_answered_wrongly(
    client: openai.OpenAI, expected, directory: Path
) -> None:
    """Every answer is that of the prefix before or after; an answer after the exchange is new."""
    pirate, other = directory / "served" / "pirate", directory / "replacement" / "pirate"
    names = ["pirate", "replacement"]
    exchanges: list[float] = [time.monotonic()]
    wrong: list[str] = []
    counts = {"pirate": 0, "replacement": 0}
    stop = threading.Event()

    def ask(number: int) -> None:
        while not stop.is_set():
            # The prefixes that were in place at any time of this request.
            first = len(exchanges) - 1
            try:
                answer = client.completions.create(
                    model="pirate",
                    prompt=f"{QUESTIONS[number]}\n",
                    extra_body={"return_token_ids": True},
                    **GREEDY,
                )
            except openai.APIStatusError as error:
                wrong.append(f"{error.status_code}: {error}")
                continue
            allowed = {names[n % 2] for n in range(first, len(exchanges))}
            ids = answer.choices[0].token_ids
            named = [x for x in names if expected["answers"][x][number]["ids"] == ids]
            if not named or named[0] not in allowed:
                wrong.append(f"{named} instead of {allowed}: {answer.choices[0].text}")
            else:
                counts[named[0]] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(QUESTIONS))]
    for thread in threads:
        thread.start()
    for _ in range(6):
        time.sleep(4)
        swap(pirate, other)
        exchanges.append(time.monotonic())
    time.sleep(4)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert min(counts.values()) > 0, counts
