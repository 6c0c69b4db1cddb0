"""Tests wrong requests, keys and the smaller routes: every error has OpenAI's shape."""

from __future__ import annotations

import pytest
import serving

from prefix_jax.serve.app import Limits


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"prompt": ""}, "the prompt is empty", None),
        ({"prompt": []}, "give at least one prompt", "prompt"),
        ({"prompt": {"a": 1}}, "prompt: Input should be a valid string", "prompt"),
        ({"prompt": [[1], "x"]}, "prompt: Input should be", "prompt"),
        ({"prompt": [[9999]]}, "token id 9999, outside the vocabulary (size 257)", None),
        ({"prompt": ["x", [1]], "max_tokens": 1}, "prompt: Input should be", "prompt"),
        ({"prompt": "\ud800"}, "not valid JSON", None),
        ({"max_tokens": 300}, "exceed the model's 256 positions", None),
        ({"max_tokens": 0}, "max_tokens 0 needs echo", None),
        ({"max_tokens": True}, "max_tokens: Input should be", "max_tokens"),
        ({"temperature": -1}, "temperature: Input should be greater", "temperature"),
        ({"temperature": "nan"}, "temperature: Input should be", "temperature"),
        ({"n": 2, "temperature": 0}, "n 2 needs a temperature above 0", None),
        ({"n": 1000}, "n: Input should be less than or equal to 128", "n"),
        ({"best_of": 1, "n": 2, "temperature": 1}, "best_of 1 is less than n 2", None),
        ({"best_of": 2, "stream": True, "temperature": 1}, "best_of above n cannot stream", None),
        ({"stop": [""]}, "stop: give at most 16 texts", "stop"),
        ({"presence_penalty": 0.5}, "presence_penalty: Input should be 0", "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias: Dictionary should have at most 0", "logit_bias"),
        ({"logprobs": 21}, "logprobs: Input should be less than or equal to 20", "logprobs"),
        ({"suffix": "end"}, "suffix: Input should be", "suffix"),
        ({"stream_options": {"include_usage": True}}, "stream_options need stream", None),
        ({"colour": "red"}, "colour: this field is unknown or not supported", "colour"),
    ],
)
def test_wrong_fields_are_refused(server, fields, message, param) -> None:
    answer = server.complete("alpha", **{"prompt": "x", **fields})
    assert answer.status == 400, answer.content
    assert message in answer.error["message"]
    assert (answer.error["type"], answer.error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"model": 1}', b"[" * 5000])
def test_broken_bodies_are_refused(server, content) -> None:
    answer = server.post("/v1/completions", content)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"


def test_harmless_fields_are_ignored(server) -> None:
    fields = {"user": "u", "metadata": {"a": "b"}, "presence_penalty": 0, "logit_bias": {}}
    assert server.complete("alpha", **fields).status == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("name", ["nobody", "", "../alpha", "alpha/", "a" * 300, "\0"])
def test_unknown_models_are_never_answered_by_the_base(server, path, name) -> None:
    prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    answer = server.post(path, model=name, **prompt)
    assert answer.status == 404
    assert (answer.error["code"], answer.error["param"]) == ("model_not_found", "model")


def test_wrong_routes_and_methods_are_errors_too(server) -> None:
    assert server.get("/v1/nothing").error["message"] == "there is no route /v1/nothing"
    answer = server.get("/v1/completions")
    assert (answer.status, answer.error["type"]) == (405, "invalid_request_error")


def test_tokens_and_texts_convert(server) -> None:
    answer = server.post("/tokenize", model="alpha", prompt="hi!", return_token_strs=True).json
    assert (answer["count"], answer["token_strs"]) == (3, ["h", "i", "!"])
    assert answer["max_model_len"] == 256 - 4
    back = server.post("/detokenize", model="base", tokens=answer["tokens"]).json
    assert back == {"prompt": "hi!"}
    assert server.post("/tokenize", prompt="hi", add_special_tokens=False).json["count"] == 2
    assert server.get("/tokenizer_info").json["eos_token"] == "</s>"
    assert "either" in server.post("/tokenize", model="base").error["message"]


def test_metrics_have_the_names_of_vllm(server) -> None:
    def value(name: str) -> float:
        lines = server.get("/metrics").content.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    label = '{model_name="beta"}'
    counters = (
        "prompt_tokens_total",
        "generation_tokens_total",
        "e2e_request_latency_seconds_count",
    )
    before = [value(f"vllm:{name}{label}") for name in counters]
    server.complete("beta", "abc", max_tokens=60, ignore_eos=True)
    after = [value(f"vllm:{name}{label}") for name in counters]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 60, 1]
    assert value("vllm:num_requests_running") == value("vllm:num_requests_waiting") == 0
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds"):
        assert value(f"vllm:{name}_count{label}") > 0
    stats = server.engine.stats
    assert value("vllm:spec_decode_num_draft_tokens_total") == stats.drafted_tokens
    assert value("vllm:spec_decode_num_accepted_tokens_total") == stats.accepted_tokens
    success = 'vllm:request_success_total{finished_reason="length",model_name="beta"}'
    assert value(success) > 0


@pytest.fixture(scope="module")
def guarded(model, directory):
    """A server with keys and small limits."""
    limits = Limits(api_keys=("one", "two"), admin_key="root", request_bytes=1000)
    with serving.running(serving.make_engine(model), prefix_dir=directory, limits=limits) as server:
        yield server


@pytest.mark.parametrize("key", [None, "", "three", "one two", "öne"])
def test_requests_need_a_key(guarded, key) -> None:
    for path in ("/v1/models", "/v1/prefixes"):
        answer = guarded.get(path, key=None if key is None else key.encode().decode("latin-1"))
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert guarded.get("/health").status == guarded.get("/metrics").status == 200


def test_every_key_opens_what_it_should(guarded) -> None:
    for key in ("one", "two", "root"):
        assert guarded.get("/v1/models", key=key).status == 200
    assert guarded.get("/v1/prefixes", key="one").status == 401
    assert guarded.get("/v1/prefixes", key="root").status == 200


def test_without_an_admin_key_nobody_loads_prefixes(server) -> None:
    answer = server.post("/v1/prefixes", name="gamma", key="any")
    assert (answer.status, answer.error["type"]) == (403, "permission_error")


def test_large_requests_are_refused(guarded) -> None:
    answer = guarded.post("/v1/completions", b"x" * 1001, key="one")
    assert answer.status == 413
    assert guarded.post("/tokenize", model="alpha", prompt="x", key="one").status == 200
