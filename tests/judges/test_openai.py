"""The official client of OpenAI understands every answer and every error."""

from __future__ import annotations

import json

import openai
import pytest

QUESTION = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def client(served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_models_are_listed(client: openai.OpenAI, served) -> None:
    assert [model.id for model in client.models.list()] == [served.base, *sorted(served.texts)]
    assert client.models.retrieve("pirate").parent == served.base


def test_completions(client: openai.OpenAI, served) -> None:
    def complete(model: str) -> str:
        prompt = "The capital of Italy is"
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=4, temperature=0, logprobs=2, echo=True
        )
        (choice,) = answer.choices
        assert len(choice.logprobs.tokens) == answer.usage.total_tokens
        assert "".join(choice.logprobs.tokens) == choice.text
        return choice.text.removeprefix(prompt)

    assert complete("facts").startswith(" Rome")
    assert complete(served.base) != complete("pirate")


def test_prefix_is_the_same_as_its_text(client: openai.OpenAI, served) -> None:
    """The prefix is the KV of the text, so the base model continues the text in the same way."""
    fields = {"max_tokens": 24, "temperature": 0}
    prompt = "The capital of France is"
    short = client.completions.create(model="facts", prompt=prompt, **fields)
    whole = client.completions.create(
        model=served.base, prompt=served.texts["facts"] + prompt, **fields
    )
    assert short.choices[0].text == whole.choices[0].text
    assert short.usage.prompt_tokens < whole.usage.prompt_tokens


def test_chats_and_streams(client: openai.OpenAI) -> None:
    fields = {"model": "pirate", "messages": QUESTION, "max_tokens": 24, "temperature": 0}
    answer = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    stream = client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content
    assert len(text) > 20
    assert last.usage == answer.usage
    assert all(len(token.top_logprobs) == 2 for token in answer.choices[0].logprobs.content)


def test_json_schemas(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 1, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="pirate",
        messages=[{"role": "user", "content": "Describe a person as JSON."}],
        max_tokens=100,
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": schema}},
    )
    assert answer.choices[0].finish_reason == "stop"
    person = json.loads(answer.choices[0].message.content)
    assert len(person["name"]) <= 12
    assert 1 <= person["age"] <= 99


def test_errors_have_the_clients_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="pirate", prompt="x", max_tokens=100_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="pirate", prompt="x", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="pirate",
            messages=QUESTION,
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
