"""vLLM's engine with prefixes generates the tokens of prefix_jax, in every situation."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import NAMES, NEW_TOKENS, swap

# Few blocks, so that requests are preempted; small steps, so that prompts are split.
SETTINGS = {
    "dtype": "float32",
    "max_model_len": 900,
    "block_size": 32,
    "num_gpu_blocks_override": 30,
    "max_num_batched_tokens": 96,
    "enforce_eager": True,
    "disable_log_stats": False,
}


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[Any]:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="PrefixConnector",
        kv_role="kv_consumer",
        kv_connector_module_path="prefix_vllm.connector",
    )
    llm = LLM(str(directory / "served" / "model"), kv_transfer_config=transfer, **SETTINGS)
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def prefixes(directory: Path) -> Any:
    from prefix_vllm.stored import Prefixes

    return Prefixes(directory / "served")


def ask(llm: Any, prefixes: Any, asked: list[tuple[str, list[int]]], **options: Any) -> list[Any]:
    """Sends (prefix, prompt) pairs in one batch and returns vLLM's outputs."""
    from prefix_vllm.stored import placeholder_id
    from vllm import SamplingParams

    placeholder = placeholder_id(llm.llm_engine.model_config.hf_config)
    prompts, params = [], []
    for name, ids in asked:
        prompt, extra = {"prompt_token_ids": ids}, {}
        if name != "none":
            prompt, extra = prefixes[name].request(ids, placeholder)
        prompts.append(prompt)
        values = {"temperature": 0, "max_tokens": NEW_TOKENS, "logprobs": 0} | options
        params.append(SamplingParams(extra_args=extra, **values))
    return llm.generate(prompts, params, use_tqdm=False)


def assert_equal(output: Any, answer: dict[str, list]) -> None:
    """Asserts equal tokens, and log-probabilities within float32's rounding."""
    (sample,) = output.outputs
    assert list(sample.token_ids) == answer["ids"]
    logprobs = [
        step[token].logprob for step, token in zip(sample.logprobs, answer["ids"], strict=True)
    ]
    assert logprobs == pytest.approx(answer["logprobs"], abs=2e-4)


def preemptions(llm: Any) -> int:
    (metric,) = [x for x in llm.get_metrics() if x.name == "vllm:num_preemptions"]
    return metric.value


def test_one_batch_mixes_prefixes(llm, prefixes, expected) -> None:
    asked = [
        (name, number, ids) for number, ids in enumerate(expected["prompts"]) for name in NAMES
    ]
    outputs = ask(llm, prefixes, [(name, ids) for name, _, ids in asked])
    for (name, number, _), output in zip(asked, outputs, strict=True):
        assert_equal(output, expected["answers"][name][number])
    first = {tuple(expected["answers"][name][0]["ids"]) for name in NAMES}
    assert len(first) == len(NAMES), "the prefixes must differ in effect"


def test_preempted_requests_continue_with_their_prefix(llm, prefixes, expected) -> None:
    """Fifteen texts of 72 tokens need more blocks than there are."""
    asked = [
        (name, number, ids) for number, ids in enumerate(expected["prompts"][:3]) for name in NAMES
    ]
    pairs = [(name, ids) for name, _, ids in asked]
    before = preemptions(llm)
    outputs = ask(llm, prefixes, pairs, max_tokens=72, ignore_eos=True)
    assert preemptions(llm) > before
    for (name, number, _), output in zip(asked, outputs, strict=True):
        answer = expected["answers"][name][number]["ids"]
        assert list(output.outputs[0].token_ids)[: len(answer)] == answer


def test_cached_blocks_are_used_again(llm, prefixes, expected) -> None:
    ids = expected["prompts"][0] * 6
    for name in NAMES:
        (first,) = ask(llm, prefixes, [(name, ids)])
        (second,) = ask(llm, prefixes, [(name, ids)])
        assert second.num_cached_tokens >= 32
        assert second.outputs[0].token_ids == first.outputs[0].token_ids


@pytest.mark.parametrize("name", NAMES)
def test_long_prompts_are_split_into_chunks(name: str, llm, prefixes, expected) -> None:
    for _ in range(2):  # the second time from vLLM's cache
        (output,) = ask(llm, prefixes, [(name, expected["long"])])
        assert_equal(output, expected["after_long"][name])


def test_wrong_requests_end_with_an_error_and_others_are_answered(llm, prefixes, expected) -> None:
    from vllm import SamplingParams

    ids = expected["prompts"][0]
    prompt, extra = prefixes["poet"].request(ids, 1)
    plain = {"prompt_token_ids": ids}
    wrong = [
        (prompt, {"kv_transfer_params": {"prefix": "absent"}}),
        ({**prompt, "cache_salt": "prefix:0"}, extra),
        (plain, extra),
        ({**plain, "cache_salt": prompt["cache_salt"]}, {}),
        ({**prompt, "prompt_token_ids": prompt["prompt_token_ids"][:20]}, extra),
    ]
    params = [SamplingParams(temperature=0, max_tokens=NEW_TOKENS, extra_args=x) for _, x in wrong]
    right = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0, extra_args=extra)
    outputs = llm.generate([*(p for p, _ in wrong), prompt], [*params, right], use_tqdm=False)
    for output in outputs[:-1]:
        assert output.outputs[0].finish_reason == "error"
        assert output.outputs[0].text == ""
    assert_equal(outputs[-1], expected["answers"]["poet"][0])
    (output,) = ask(llm, prefixes, [("poet", ids)], prompt_logprobs=1)
    assert output.outputs[0].finish_reason == "error"


def test_damaged_prefix_ends_its_request_only(llm, prefixes, expected, directory) -> None:
    # A prefix that no worker has in memory yet.
    damaged = directory / "served" / "damaged"
    shutil.copytree(directory / "replacement" / "pirate", damaged)
    file = damaged / "prefix.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    ids = expected["prompts"][1]
    first, second = ask(llm, prefixes, [("damaged", ids), ("cook", ids)])
    shutil.rmtree(damaged)
    assert first.outputs[0].finish_reason == "error"
    assert_equal(second, expected["answers"]["cook"][1])


def test_several_samples_share_the_prompt(llm, prefixes, expected) -> None:
    (output,) = ask(llm, prefixes, [("code", expected["prompts"][1])], n=3, temperature=0.8, seed=7)
    assert len(output.outputs) == 3
    assert all(sample.finish_reason in ("stop", "length") for sample in output.outputs)


def test_replaced_prefix_is_never_answered_from_old_blocks(
    llm, prefixes, expected, directory
) -> None:
    ids = expected["prompts"]
    pirate, other = directory / "served" / "pirate", directory / "replacement" / "pirate"
    before = ask(llm, prefixes, [("pirate", prompt) for prompt in ids])
    swap(pirate, other)
    try:
        after = ask(llm, prefixes, [("pirate", prompt) for prompt in ids])
    finally:
        swap(pirate, other)
    again = ask(llm, prefixes, [("pirate", prompt) for prompt in ids])
    for number in range(len(ids)):
        assert_equal(before[number], expected["answers"]["pirate"][number])
        assert_equal(after[number], expected["answers"]["replacement"][number])
        assert_equal(again[number], expected["answers"]["pirate"][number])
