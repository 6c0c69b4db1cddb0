"""`prefix-jax serve` against the simplest server of transformers and PEFT.

    make bench NAME=serving

SmolLM2-135M, float32, 16 prefixes of 8 to 64 slots, prompts of the cleaned E2E data, 32 new tokens
without end of text, streamed. The load comes from vLLM's `bench serve`, in its own environment: 1,
8 and 32 clients, each with one request at a time for the next prefix. Both servers run throughout
and are measured in turns; a cell is the median of the rounds. Before, both must give the same
greedy texts. Needs `make .venv-vllm/installed` and an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

VLLM = common.ROOT / ".venv-vllm" / "bin" / "python"
LENGTHS = (8, 16, 24, 32, 40, 48, 56, 64) * 2
NEW, ROUNDS = 32, 3
# Requests per round, by the number of clients.
REQUESTS = {1: 6, 8: 24, 32: 48}
GOAL = 3.0

# The command `vllm` of the CPU build fails, because its package has another name.
LOAD = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def prepare(directory: Path) -> list[str]:
    """Writes the prefixes for both servers, the tokenizer and the prompts; returns the prompts."""
    import jax.numpy as jnp

    import prefix_jax as pj
    from prefix_jax import artifact
    from prefix_jax.artifact import BackboneCard
    from prefix_jax.prefix import KVPrefix, Prefix, Site

    model, rng = pj.load(common.MODEL, dtype="float32"), np.random.default_rng(0)
    model.tokenizer.save_pretrained(directory / "tokenizer")
    shape = model.backbone.geometry.main
    card = BackboneCard(
        source=common.MODEL,
        model_type=model.backbone.arch.model_type,
        fingerprint=model.fingerprint,
        dtype="float32",
    )
    for number, length in enumerate(LENGTHS):
        # It distinguishes the prefixes but hardly disturbs the model.
        size = (2, shape.layers, length, shape.kv_heads, shape.head_dim)
        k, v = 0.3 * rng.normal(size=size).astype(np.float32)
        np.savez(directory / f"{number:02}.npz", k_LPKH=k, v_LPKH=v)
        prefix = Prefix(Site(KVPrefix(jnp.asarray(k), jnp.asarray(v))), text_position=length)
        of_prefix = artifact.make_card(prefix, model.backbone.geometry, card)
        pj.Tuned(model, prefix, of_prefix).save(
            directory / "prefixes" / f"{number:02}", "safetensors"
        )
    with common.e2e("dev.csv").open(encoding="utf-8", newline="") as file:
        records = list(dict.fromkeys(record["mr"] for record in csv.DictReader(file)))
    prompts = [common.INPUT.format(mr=mr) for mr in records[: max(REQUESTS.values())]]
    lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (directory / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    return prompts


@contextlib.contextmanager
def server(command: list[str], port: int) -> Iterator[str]:
    """Runs a server; yields its address."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment()) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            while True:
                assert process.poll() is None, f"{command} has ended"
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                    break
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()


def environment() -> dict[str, str]:
    """The environment of both servers."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(common.ROOT)}


def free_port() -> int:
    """A port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def text(url: str, model: str, prompt: str) -> str:
    """The greedy continuation of a prompt, from a stream."""
    fields = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "stream": True}
    body = json.dumps({"model": model, "prompt": prompt, **fields}).encode()
    with urllib.request.urlopen(f"{url}/v1/completions", body) as response:
        events = response.read().decode().split("\n\n")[:-2]
    pieces = (json.loads(event.removeprefix("data: ")) for event in events)
    return "".join(choice["text"] for piece in pieces for choice in piece["choices"])


def load(url: str, directory: Path, clients: int) -> dict[str, Any]:
    """Runs the load generator; returns its result."""
    options = {
        "backend": "openai",
        "base-url": url,
        "endpoint": "/v1/completions",
        "model": common.MODEL,
        "tokenizer": directory / "tokenizer",
        "dataset-name": "custom",
        "dataset-path": directory / "prompts.jsonl",
        "custom-output-len": NEW,
        "num-prompts": REQUESTS[clients],
        "max-concurrency": clients,
        "temperature": 0,
        "lora-assignment": "round-robin",
        "percentile-metrics": "ttft,itl,e2el",
        "metric-percentiles": "50,99",
        "result-dir": directory,
        "result-filename": "result.json",
    }
    command = [VLLM, "-c", LOAD, *(x for k, v in options.items() for x in (f"--{k}", v))]
    command += ["--ignore-eos", "--skip-chat-template", "--save-result", "--disable-tqdm"]
    command += ["--lora-modules", *(f"{number:02}" for number in range(len(LENGTHS)))]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"the load generator failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads((directory / "result.json").read_text())
    assert result["completed"] == REQUESTS[clients], result
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    common.output_argument(parser, "serving")
    args = parser.parse_args()
    if not VLLM.exists():
        sys.exit("this benchmark needs vLLM's load generator: make .venv-vllm/installed")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        prompts = prepare(directory)
        ports = free_port(), free_port()
        ours = [sys.executable, "-m", "prefix_jax.cli.main", "serve", common.MODEL]
        ours += ["--dtype", "float32", "--prefix-dir", str(directory / "prefixes")]
        ours += ["--port", str(ports[0])]
        peer = [sys.executable, str(Path(__file__).with_name("serving_peer.py"))]
        peer += [str(directory), str(ports[1])]
        with server(ours, ports[0]) as url, server(peer, ports[1]) as peer_url:
            urls = {"prefix-jax serve": url, "transformers + PEFT": peer_url}
            for number in (0, 5, 7):
                texts = [text(base, f"{number:02}", prompts[number]) for base in urls.values()]
                assert texts[0] == texts[1], texts
            results: dict[tuple[str, int], list[dict[str, Any]]] = {}
            for clients in REQUESTS:
                load(url, directory, clients)  # compiles; PyTorch does not
            for _ in range(args.rounds):
                for clients in REQUESTS:
                    for name, base in urls.items():
                        result = load(base, directory, clients)
                        speed = result["output_throughput"]
                        print(f"{name}, {clients}: {speed:.1f} tokens/s", flush=True)
                        results.setdefault((name, clients), []).append(result)
    write(args.output, results)


def write(path: Path, results: dict[tuple[str, int], list[dict[str, Any]]]) -> None:
    """Writes the table; `results` has the rounds of each server and number of clients."""

    def median(name: str, clients: int, key: str) -> float:
        return statistics.median(result[key] for result in results[name, clients])

    rows = []
    for clients in REQUESTS:
        for name in ("prefix-jax serve", "transformers + PEFT"):
            speed = median(name, clients, "output_throughput")
            ratio = speed / median("transformers + PEFT", clients, "output_throughput")
            times = ("p50_ttft_ms", "p99_ttft_ms", "p50_e2el_ms", "p99_e2el_ms")
            rows.append(
                [
                    name,
                    clients,
                    f"{speed:.1f}",
                    f"{ratio:.2f}x",
                    *(f"{median(name, clients, key) / 1000:.2f}" for key in times),
                ]
            )
    common.write_table(
        path,
        f"Serving SmolLM2-135M, {len(LENGTHS)} prefixes, {NEW} new tokens (goal: {GOAL}x at 8)",
        [
            "server",
            "clients",
            "tokens/s",
            "to PEFT",
            "first token p50, s",
            "p99",
            "request p50, s",
            "p99",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
