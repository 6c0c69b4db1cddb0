"""Tests `/v1/chat/completions`: templates, streams, log-probabilities and JSON schemas."""

from __future__ import annotations

import json

import pytest
import serving

import prefix_jax as pj

USER = {"role": "user", "content": "Who?"}


def chat(server: serving.Running, model: str, *messages, **fields) -> serving.Answer:
    defaults = {"max_tokens": 6, "temperature": 0}
    return server.post(
        "/v1/chat/completions",
        model=model,
        messages=list(messages or [USER]),
        **defaults | fields,
    )


@pytest.mark.parametrize("name", ["base", "alpha"])
def test_the_tokenizers_template_renders_messages(server, tuned, name) -> None:
    system = {"role": "developer", "content": "Be"}
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]
    answer = chat(server, name, system, {"role": "user", "content": parts}).json
    rendered = "[system] Be</s>[user] Who?</s>[assistant] "
    prefix = tuned["alpha"].without_prefix() if name == "base" else tuned[name]
    text = prefix.generate(rendered, decode=pj.DecodeConfig(max_new_tokens=6))
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert answer["object"] == "chat.completion"
    tokens = server.post("/tokenize", model=name, prompt=rendered).json
    assert answer["usage"]["prompt_tokens"] == tokens["count"]


def test_streamed_pieces_make_the_message(server) -> None:
    fields = {"n": 2, "temperature": 1.5, "seed": 1, "logprobs": True, "top_logprobs": 2}
    whole = chat(server, "beta", **fields).json
    answer = chat(server, "beta", **fields, stream=True)
    pieces = [event["choices"][0] for event in answer.events]
    for choice in whole["choices"]:
        of_choice = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert of_choice[0]["delta"] == {"role": "assistant", "content": ""}
        contents = [piece["delta"].get("content", "") for piece in of_choice]
        assert "".join(contents) == choice["message"]["content"]
        assert of_choice[-1]["finish_reason"] == choice["finish_reason"]
        tokens = [
            x for piece in of_choice if piece["logprobs"] for x in piece["logprobs"]["content"]
        ]
        assert tokens == choice["logprobs"]["content"]
        assert all(len(token["top_logprobs"]) == 2 for token in tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_makes_valid_json(server, stream) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "size": {"enum": [1, 20, 300]}},
        "required": ["ok", "size"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    fields = {"max_tokens": 200, "temperature": 1.0, "response_format": form, "stream": stream}
    # Another row is free while this one follows the schema.
    answer = chat(server, "alpha", **fields)
    if stream:
        deltas = [event["choices"][0]["delta"] for event in answer.events]
        text = "".join(delta.get("content", "") for delta in deltas)
    else:
        (choice,) = answer.json["choices"]
        text = choice["message"]["content"]
        assert choice["finish_reason"] == "stop"
    value = json.loads(text)
    assert value["ok"] in (True, False)
    assert value["size"] in (1, 20, 300)


def test_json_object_is_any_object(server) -> None:
    form = {"type": "json_object"}
    answer = chat(server, "base", response_format=form, max_tokens=3).json
    assert answer["choices"][0]["message"]["content"].lstrip().startswith("{")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role: Input should be"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "last message must not be"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages: Input"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"top_logprobs": 3}, "top_logprobs need logprobs"),
        ({"tools": [{"type": "function"}]}, "tools: List should have at most 0 items"),
        ({"response_format": {"type": "json_schema"}}, "json_schema belongs to type json_schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "nope"}},
                }
            },
            "the JSON schema is not supported",
        ),
    ],
)
def test_wrong_chats_are_refused(server, fields, message) -> None:
    answer = server.post("/v1/chat/completions", **{"model": "alpha", "messages": [USER], **fields})
    assert answer.status == 400
    assert message in answer.error["message"]
    assert answer.error["type"] == "invalid_request_error"
