"""Tests `/v1/completions`: the texts, log-probabilities and streams of OpenAI's API."""

from __future__ import annotations

import math

import pytest
import serving
import tiny
import tiny_runs

import prefix_jax as pj

MODELS = ["base", "alpha", "beta"]


def expected(tuned: dict[str, pj.Tuned], name: str, prompt, **options):
    """The first continuation by `Tuned.generate`."""
    any_tuned = next(iter(tuned.values()))
    prefix = any_tuned.without_prefix() if name == "base" else tuned[name]
    if not isinstance(prompt, str):
        prompt = prefix.pretrained.tokenizer.decode(prompt)
    config = pj.DecodeConfig(**{"max_new_tokens": 6, **options})
    return prefix.generate(prompt, decode=config, details=True).samples[0]


@pytest.mark.parametrize("name", MODELS)
def test_text_is_that_of_the_prefix(server, tuned, name) -> None:
    answer = server.complete(name, "2+3=")
    sample = expected(tuned, name, "2+3=")
    content = answer.json
    (choice,) = content["choices"]
    assert (answer.status, content["object"], content["model"]) == (200, "text_completion", name)
    assert (choice["text"], choice["index"], choice["logprobs"]) == (sample.text, 0, None)
    assert choice["finish_reason"] == {"length": "length"}.get(sample.finish, "stop")
    used = len(sample.ids)
    assert content["usage"]["prompt_tokens"] == 4
    assert content["usage"]["completion_tokens"] == used
    assert content["usage"]["total_tokens"] == 4 + used


@pytest.mark.parametrize("prompts", [["2+3=", "1+1=", "x"], [[50, 43, 51], [49, 43]]])
def test_every_prompt_of_a_list_gets_its_choices(server, tuned, prompts) -> None:
    choices = server.complete("alpha", prompts).json["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(prompts)))
    texts = [expected(tuned, "alpha", prompt).text for prompt in prompts]
    assert [choice["text"] for choice in choices] == texts


def test_token_ids_are_one_prompt(server, tuned) -> None:
    (choice,) = server.complete("alpha", [50, 43, 51]).json["choices"]
    assert choice["text"] == expected(tuned, "alpha", [50, 43, 51]).text


def test_streamed_pieces_make_the_text(server) -> None:
    fields = {"prompt": ["2+3=", "1+"], "temperature": 1.0, "n": 2, "seed": 5, "logprobs": 2}
    whole = server.complete("beta", **fields).json
    answer = server.complete("beta", **fields, stream=True, stream_options={"include_usage": True})
    *events, last = answer.events
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {event["id"] for event in [*events, last]} == {last["id"]}
    pieces = [event["choices"][0] for event in events]
    for choice in whole["choices"]:
        of_choice = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in of_choice) == choice["text"]
        assert of_choice[-1]["finish_reason"] == choice["finish_reason"]
        assert all(piece["finish_reason"] is None for piece in of_choice[:-1])
        for key, values in choice["logprobs"].items():
            assert [x for piece in of_choice for x in piece["logprobs"][key]] == values


def test_seed_repeats_a_text_and_no_seed_varies_it(server) -> None:
    def texts(**fields) -> list[str]:
        answer = server.complete("alpha", temperature=2, n=4, max_tokens=8, **fields)
        return [choice["text"] for choice in answer.json["choices"]]

    assert texts(seed=7) == texts(seed=7)
    assert texts() != texts()
    assert len({*texts(seed=-1)}) > 1


def test_best_of_returns_the_likeliest(server) -> None:
    fields = {"temperature": 2, "seed": 7, "logprobs": 0}
    everything = server.complete("alpha", n=4, **fields).json
    best = server.complete("alpha", n=2, best_of=4, **fields).json

    def mean(choice) -> float:
        logprobs = choice["logprobs"]["token_logprobs"]
        return sum(logprobs) / len(logprobs)

    likeliest = sorted(everything["choices"], key=mean, reverse=True)
    assert [choice["text"] for choice in best["choices"]] == [x["text"] for x in likeliest[:2]]
    assert best["usage"] == everything["usage"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_repeats_and_scores_the_prompt(server, tuned, max_tokens, stream) -> None:
    prompt = "two words"
    sample = expected(tuned, "alpha", prompt, max_new_tokens=2)
    answer = server.complete(
        "alpha", prompt, echo=True, logprobs=3, max_tokens=max_tokens, stream=stream
    )
    if stream:
        pieces = [event["choices"][0] for event in answer.events]
        text = "".join(piece["text"] for piece in pieces)
        logprobs = {
            key: [x for piece in pieces for x in piece["logprobs"][key]]
            for key in pieces[0]["logprobs"]
        }
    else:
        assert answer.json["usage"]["completion_tokens"] == max_tokens
        text = answer.json["choices"][0]["text"]
        logprobs = answer.json["choices"][0]["logprobs"]
    assert text == prompt + (sample.text if max_tokens else "")
    count = len(prompt) + max_tokens
    assert "".join(logprobs["tokens"][: len(prompt)]) == prompt
    assert logprobs["text_offset"][: len(prompt)] == list(range(len(prompt)))
    values, top = logprobs["token_logprobs"], logprobs["top_logprobs"]
    assert len(values) == len(top) == count
    assert values[0] is top[0] is None
    assert all(max(best.values()) >= value for best, value in zip(top[1:], values[1:], strict=True))
    # The prompt scores what generation gives when it writes the prompt itself.
    continued = server.complete("alpha", prompt + "!", echo=True, logprobs=0, max_tokens=0).json
    longer = continued["choices"][0]["logprobs"]["token_logprobs"]
    assert longer[1 : len(prompt)] == pytest.approx(values[1 : len(prompt)], abs=1e-4)
    if max_tokens:
        assert values[len(prompt) :] == pytest.approx(sample.logprobs, abs=1e-4)


def test_stop_texts_end_a_text(server, tuned) -> None:
    text = expected(tuned, "alpha", "2+3=").text
    stop = text[3]
    choice = server.complete("alpha", stop=[stop, "never"]).json["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_settings_of_the_prefix_are_the_defaults(server, tuned) -> None:
    def text(**fields) -> str:
        body = {"model": "stored", "prompt": "2+3=", **fields}
        answer = server.post("/v1/completions", body)
        return answer.json["choices"][0]["text"]

    # Greedy, and three tokens. The engine has no beams.
    assert text(temperature=0) == expected(tuned, "stored", "2+3=", max_new_tokens=3).text
    assert (
        text(temperature=0, max_tokens=5)
        == expected(tuned, "stored", "2+3=", max_new_tokens=5).text
    )


def test_limits_of_length_are_followed(server) -> None:
    usage = server.complete("base", ignore_eos=True, max_tokens=12).json["usage"]
    assert usage["completion_tokens"] == 12
    # Without a limit of its own, a request never fails for its length.
    chat = [{"role": "user", "content": "x" * 200}]
    answer = server.post("/v1/chat/completions", model="beta", messages=chat, temperature=0)
    used = answer.json["usage"]
    assert answer.status == 200
    assert used["total_tokens"] <= 256 - 7


def test_log_probabilities_are_finite_and_sum_below_one(server) -> None:
    top = server.complete("beta", logprobs=20).json["choices"][0]["logprobs"]["top_logprobs"]
    assert all(0 < sum(map(math.exp, best.values())) <= 1 + 1e-5 for best in top)


def test_encoder_decoders_answer_too(tmp_path) -> None:
    model = tiny_runs.on_one_device(tiny.write_t5(tmp_path / "model"))
    engine = pj.Engine(model, rows=2)
    config = pj.DecodeConfig(max_new_tokens=4)
    (alone,) = engine.generate(["2+3="], None, config)
    with serving.running(engine) as server:
        choice = server.complete("base", max_tokens=4).json["choices"][0]
        assert choice["text"] == alone.text
        answer = server.complete("base", echo=True, logprobs=1)
        assert (answer.status, "no log-probabilities" in answer.error["message"]) == (400, True)
