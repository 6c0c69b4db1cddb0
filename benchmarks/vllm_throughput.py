"""Throughput of an unmodified vLLM on CPU with prefixes, against none.

    make bench NAME=vllm_throughput

SmolLM2-135M, float32, 32 requests of 24 new tokens without end of text, prompts of the cleaned E2E
data. One engine answers the kinds of batches in turns: without a prefix, with one prefix, with 16
prefixes mixed, and without a prefix but with as many more tokens in front. vLLM's own cache is off.
Needs `make .venv-vllm/installed` and an idle machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import common

VLLM = common.ROOT / ".venv-vllm" / "bin" / "python"
REQUESTS, NEW, LENGTH, PREFIXES = 32, 24, 8, 16
KINDS = ("none", "one", "mixed", "tokens")
TITLES = {
    "none": "no prefix",
    "one": f"one prefix of {LENGTH}",
    "mixed": f"{PREFIXES} prefixes of {LENGTH}, mixed",
    "tokens": f"no prefix, {LENGTH} more tokens",
}
GOAL = 0.95


def prepare(directory: Path, rounds: int) -> None:
    """Exports the model and the prefixes, and writes the prompts of every round."""
    import jax
    import jax.numpy as jnp

    import prefix_jax as pj
    from prefix_jax import artifact
    from prefix_jax.artifact import BackboneCard
    from prefix_jax.backbones.starts import starts_from_text
    from prefix_jax.interop.huggingface import write_huggingface
    from prefix_jax.interop.vllm import export_vllm

    model = pj.load(common.MODEL, dtype="float32")
    write_huggingface(common.MODEL, directory / "served" / "model")
    backbone = BackboneCard(
        source=common.MODEL,
        model_type=model.backbone.arch.model_type,
        fingerprint=model.fingerprint,
        dtype="float32",
    )
    with common.e2e("dev.csv").open(encoding="utf-8", newline="") as file:
        records = list(dict.fromkeys(record["mr"] for record in csv.DictReader(file)))
    ids = model.tokenizer([common.INPUT.format(mr=mr) for mr in records])["input_ids"]
    for number in range(PREFIXES):
        start = jnp.asarray(ids[-1 - number][:LENGTH])
        _, _, prefix = jax.jit(starts_from_text, static_argnums=0)(
            model.backbone, model.params, start
        )
        card = artifact.make_card(
            prefix, model.backbone.geometry, backbone, method={"name": "prefix"}
        )
        artifact.save(directory / "stored", prefix, card)
        export_vllm(directory / "stored", directory / "served" / f"p{number}")
    needed = (rounds + 1) * len(KINDS) * REQUESTS
    prompts = [ids[number % len(ids)] for number in range(needed)]
    (directory / "prompts.json").write_text(json.dumps(prompts))


def measure(directory: Path, rounds: int) -> dict[str, list[float]]:
    """The seconds of every round, by kind. Runs in vLLM's environment."""
    from prefix_vllm.stored import Prefixes, placeholder_id
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    prefixes = Prefixes(directory / "served")
    transfer = KVTransferConfig(
        kv_connector="PrefixConnector",
        kv_role="kv_consumer",
        kv_connector_module_path="prefix_vllm.connector",
    )
    llm = LLM(
        str(directory / "served" / "model"),
        dtype="float32",
        max_model_len=512,
        block_size=32,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_transfer_config=transfer,
    )
    placeholder = placeholder_id(llm.llm_engine.model_config.hf_config)
    prompts = iter(json.loads((directory / "prompts.json").read_text()))

    def batch(kind: str) -> tuple[list[dict[str, Any]], list[SamplingParams]]:
        requests, params = [], []
        for number in range(REQUESTS):
            ids = next(prompts)
            request, extra = {"prompt_token_ids": ids}, {}
            if kind == "tokens":
                request = {"prompt_token_ids": ids[:LENGTH] + ids}
            elif kind != "none":
                name = "p0" if kind == "one" else f"p{number % PREFIXES}"
                request, extra = prefixes[name].request(ids, placeholder)
            requests.append(request)
            params.append(
                SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, extra_args=extra)
            )
        return requests, params

    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):
        # Start with another kind each time.
        for kind in KINDS[number % len(KINDS) :] + KINDS[: number % len(KINDS)]:
            requests, params = batch(kind)
            began = time.perf_counter()
            outputs = llm.generate(requests, params, use_tqdm=False)
            elapsed = time.perf_counter() - began
            assert all(len(output.outputs[0].token_ids) == NEW for output in outputs)
            if number:  # the first round warms up
                seconds[kind].append(elapsed)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    common.output_argument(parser, "vllm_throughput")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments.rounds)))
        return
    if not VLLM.exists():
        raise SystemExit("this benchmark needs vLLM: run make .venv-vllm/installed")
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory), arguments.rounds)
        environment = {
            **os.environ,
            "PYTHONPATH": f"{directory}/served",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        command = [VLLM, __file__, "--worker", directory, "--rounds", str(arguments.rounds)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=environment
        )
    seconds = json.loads(done.stdout.strip().splitlines()[-1])

    def throughput(kind: str) -> float:
        """The median over rounds of the ratio to no prefix, since the machine's speed drifts."""
        pairs = zip(seconds["none"], seconds[kind], strict=True)
        return statistics.median(none / prefixed for none, prefixed in pairs)

    rows = [
        [
            TITLES[kind],
            f"{statistics.median(seconds[kind]):.2f}",
            f"{REQUESTS * NEW / statistics.median(seconds[kind]):.0f}",
            f"{throughput(kind):.3f}x",
            f">= {GOAL}x" if kind == "mixed" else "",
        ]
        for kind in KINDS
    ]
    common.write_table(
        arguments.output,
        f"vLLM on CPU, SmolLM2-135M float32, {REQUESTS} requests of {NEW} new tokens",
        ["batch", "seconds (median)", "tokens/s", "throughput", "goal"],
        rows,
    )


if __name__ == "__main__":
    main()
