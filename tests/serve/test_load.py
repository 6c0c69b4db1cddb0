"""Tests many clients at once, clients that leave or do not read, and the end of a server."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import random
import socket
import threading
import time

import pytest
import serving

from prefix_jax.serve import server as server_module
from prefix_jax.serve.app import Limits
from prefix_jax.serve.server import EngineFailedError

LONG = {"max_tokens": 240, "ignore_eos": True, "temperature": 0}


def until(condition, seconds: float = 30) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.005)


def begin(server: serving.Running, **fields) -> socket.socket:
    """Sends a request and returns its connection, with the answer unread."""
    body = {"model": "alpha", "prompt": "2+3=", **LONG, **fields}
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def slow_down(engine, monkeypatch, seconds: float = 0.02) -> None:
    """Slows the steps down, so that a test can act between them."""
    step = engine.step

    def slow_step():
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(engine, "step", slow_step)


def test_many_clients_get_the_answers_of_one_alone(server) -> None:
    rng = random.Random(0)
    requests = [
        {
            "model": rng.choice(["base", "alpha", "beta", "stored"]),
            "prompt": "".join(rng.choices("0123456789+=", k=rng.randrange(1, 60))),
            "max_tokens": rng.randrange(1, 20),
            "temperature": rng.choice([0, 1.0]),
            "seed": 3,
            "stream": rng.random() < 0.5,
        }
        for _ in range(24)
    ]

    def text(fields) -> str:
        answer = server.post("/v1/completions", fields)
        assert answer.status == 200, answer.content
        parts = answer.events if fields["stream"] else [answer.json]
        return "".join(part["choices"][0]["text"] for part in parts)

    alone = [text(fields) for fields in requests]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(text, requests)) == alone


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(server, monkeypatch, stream) -> None:
    slow_down(server.engine, monkeypatch)
    with contextlib.closing(begin(server, stream=stream, n=2, temperature=1.0)):
        until(lambda: server.engine.running == 2)
    until(lambda: server.engine.idle)
    assert server.complete("alpha").status == 200


def test_a_full_queue_is_an_error(model, directory, monkeypatch) -> None:
    engine = serving.make_engine(model)
    prefixes = {"alpha": directory / "alpha"}
    with serving.running(engine, prefixes=prefixes, max_waiting=2) as server:
        slow_down(engine, monkeypatch)
        waiting = [begin(server) for _ in range(6)]
        until(lambda: engine.running + engine.waiting == 6)
        answer = server.complete("alpha")
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        assert answer.error["code"] == "rate_limit_exceeded"
        assert b"admission_rejections" in server.get("/metrics").content
        waiting.pop().close()
        until(lambda: engine.running + engine.waiting == 5)
        until(lambda: server.complete("alpha", max_tokens=1).status == 200)
        # More than could ever fit.
        answer = server.complete("alpha", n=7, temperature=1)
        assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
        assert "asks for 7 continuations, and the server allows 6" in answer.error["message"]
        for connection in waiting:
            connection.close()


def test_requests_end_after_their_time(model, directory, monkeypatch) -> None:
    engine = serving.make_engine(model)
    limits = Limits(request_seconds=0.3)
    with serving.running(engine, prefix_dir=directory, limits=limits) as server:
        slow_down(engine, monkeypatch)
        answer = server.complete("alpha", **LONG)
        assert (answer.status, answer.error["code"]) == (504, "timeout")
        *events, last = server.complete("alpha", **LONG, stream=True).events
        assert events[0]["choices"][0]["text"]
        assert last["error"]["code"] == "timeout"
        until(lambda: engine.idle)


def test_a_client_that_never_reads_holds_no_row(model, directory, monkeypatch) -> None:
    monkeypatch.setattr(server_module, "_READ_SECONDS", 0.5)
    engine = serving.make_engine(model)
    with serving.running(engine, prefix_dir=directory, max_waiting=0) as server:
        # Large answers, small buffers.
        fields = {"stream": True, "logprobs": 20, "n": 4, "temperature": 1.0}
        with socket.socket() as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            stuck.connect(("127.0.0.1", server.port))
            content = json.dumps({"model": "alpha", "prompt": "2+", **LONG, **fields}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}"
            stuck.sendall(head.encode() + b"\r\n\r\n" + content)
            until(lambda: engine.running == 4)
            # All rows are free again, also for the queue's count.
            until(lambda: server.complete("alpha", n=4, temperature=1.0).status == 200)


def test_running_requests_finish_before_the_server_stops(model, directory, monkeypatch) -> None:
    engine = serving.make_engine(model)
    with serving.running(engine, prefix_dir=directory) as server:
        alone = server.complete("alpha", max_tokens=40, ignore_eos=True).json["choices"]
        slow_down(engine, monkeypatch)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            fields = {"max_tokens": 40, "ignore_eos": True}
            answers = [pool.submit(server.complete, "alpha", **fields) for _ in range(6)]
            until(lambda: engine.running + engine.waiting == 6)
            server.stop()
            assert [answer.result().json["choices"] for answer in answers] == [alone] * 6
        server.thread.join(timeout=30)
        assert not server.thread.is_alive()
        assert server.failures == []
        with pytest.raises(ConnectionRefusedError):
            server.get("/health")


def test_the_second_stop_ends_running_requests(model, directory, monkeypatch) -> None:
    engine = serving.make_engine(model)
    with serving.running(engine, prefix_dir=directory) as server:
        slow_down(engine, monkeypatch, 0.1)
        with contextlib.closing(begin(server)):
            until(lambda: engine.running == 1)
            server.stop()
            server.stop()
            server.thread.join(timeout=30)
            assert not server.thread.is_alive()


def test_a_failing_engine_ends_its_clients_and_the_server(model, directory, monkeypatch) -> None:
    engine = serving.make_engine(model)
    with serving.running(engine, prefix_dir=directory) as server:
        slow_down(engine, monkeypatch)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            answer = pool.submit(server.complete, "alpha", **LONG)
            until(lambda: engine.running == 1)
            failing = threading.Event()

            def fail():
                failing.set()
                raise MemoryError("out of memory")

            monkeypatch.setattr(engine, "step", fail)
            assert answer.result().status == 503
        server.thread.join(timeout=30)
        assert not server.thread.is_alive()
        (failure,) = server.failures
        assert isinstance(failure, EngineFailedError)
        assert "out of memory" in str(failure)
