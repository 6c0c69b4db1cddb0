"""Two workers share the heads of a model and of its prefixes (tensor parallelism)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import NEW_TOKENS


def test_workers_have_their_part_of_a_prefix(
    directory: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One core each; vLLM expects a NUMA node per worker otherwise.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    from prefix_vllm.stored import Prefixes, placeholder_id
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    small, answers = directory / "small", expected["parallel"]
    transfer = KVTransferConfig(
        kv_connector="PrefixConnector",
        kv_role="kv_consumer",
        kv_connector_module_path="prefix_vllm.connector",
        kv_connector_extra_config={"root": str(small)},
    )
    llm = LLM(
        str(small / "model"),
        dtype="float32",
        max_model_len=128,
        block_size=32,
        enforce_eager=True,
        kv_transfer_config=transfer,
        tensor_parallel_size=2,
    )
    placeholder = placeholder_id(llm.llm_engine.model_config.hf_config)
    requests, params, wanted = [], [], []
    for number, ids in enumerate(answers["prompts"]):
        for name in ("none", "nine"):
            prompt, extra = {"prompt_token_ids": ids}, {}
            if name == "nine":
                prompt, extra = Prefixes(small)["nine"].request(ids, placeholder)
            requests.append(prompt)
            params.append(SamplingParams(temperature=0, max_tokens=NEW_TOKENS, extra_args=extra))
            wanted.append(answers[name][number]["ids"])
    outputs = llm.generate(requests, params, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    assert [list(output.outputs[0].token_ids) for output in outputs] == wanted
    assert answers["none"] != answers["nine"]
