"""Decoding speed against Hugging Face PEFT on PyTorch.

    make bench NAME=decode_vs_peft

SmolLM2-135M, float32, a prefix of 16, prompts of the cleaned E2E data, 64 new tokens without end of
text, so that both libraries do the same work. Each measurement runs in a separate process, with the
libraries alternating. Times are for whole calls of `generate`, including the prompts, after one
call that compiles. The generated tokens are compared.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

LENGTH, NEW = 16, 64
# Name → prompts per batch, beams, goal as a multiple of PEFT's speed.
SETTINGS = {
    "1 prompt, greedy": (1, 1, 2.0),
    "16 prompts, greedy": (16, 1, 2.0),
    "4 prompts, 5 beams": (4, 5, 4.0),
}


def prompts(count: int) -> list[str]:
    """The first distinct inputs of the development set."""
    with common.e2e("dev.csv").open(encoding="utf-8", newline="") as file:
        records = list(dict.fromkeys(record["mr"] for record in csv.DictReader(file)))
    return [common.INPUT.format(mr=mr) for mr in records[:count]]


def prepare(exchange: Path) -> dict[str, Any]:
    """Prepares a prefix initialised from a text and tokenised prompts for both libraries."""
    common.without_torch()
    import jax
    import jax.numpy as jnp

    from prefix_jax.backbones.loading.pretrained import load
    from prefix_jax.backbones.starts import starts_from_text

    model = load(common.MODEL, dtype="float32")
    text = model.tokenizer(" ".join(prompts(4)))["input_ids"][:LENGTH]
    _, _, prefix = jax.jit(starts_from_text, static_argnums=0)(
        model.backbone, model.params, jnp.asarray(text)
    )
    inside = prefix.decoder.inside
    np.savez(exchange / "prefix.npz", k_LPKH=inside.k_LPKH, v_LPKH=inside.v_LPKH)
    ids = model.tokenizer(prompts(16))["input_ids"]
    (exchange / "prompts.json").write_text(json.dumps(ids))
    return {"prompts": len(ids)}


def ours(setting: str, repeats: int, exchange: Path) -> dict[str, Any]:
    common.without_torch()
    import jax.numpy as jnp

    from prefix_jax.backbones.loading.pretrained import load
    from prefix_jax.config import DecodeConfig
    from prefix_jax.decode import Generator
    from prefix_jax.prefix import KVPrefix, Prefix, Site

    count, beams, _ = SETTINGS[setting]
    given = np.load(exchange / "prefix.npz")
    inside = KVPrefix(jnp.asarray(given["k_LPKH"]), jnp.asarray(given["v_LPKH"]))
    model = load(common.MODEL, dtype="float32")
    generator = Generator(
        model.backbone,
        model.backbone.unstacked(model.params),
        model.tokenizer,
        Prefix(Site(inside), text_position=LENGTH),
        eos=(),
    )
    ids = json.loads((exchange / "prompts.json").read_text())[:count]
    config = DecodeConfig(max_new_tokens=NEW, num_beams=beams)

    def generate() -> list[list[int]]:
        return [list(generation.samples[0].ids) for generation in generator.generate(ids, config)]

    return _timed(generate, repeats)


def peft(setting: str, repeats: int, exchange: Path) -> dict[str, Any]:
    import torch

    count, beams, _ = SETTINGS[setting]
    model = common.peft_model(np.load(exchange / "prefix.npz"), LENGTH).eval()
    model.generation_config.eos_token_id = None
    ids = json.loads((exchange / "prompts.json").read_text())[:count]
    width = max(map(len, ids))
    ids_BT = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])

    def generate() -> list[list[int]]:
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=NEW,
                num_beams=beams,
                do_sample=False,
                pad_token_id=0,
            )
        return out[:, width:].tolist()

    return _timed(generate, repeats)


def _timed(generate: Callable[[], list[list[int]]], repeats: int) -> dict[str, Any]:
    ids = generate()
    if any(len(row) != NEW for row in ids):
        raise RuntimeError("a text ended early: the libraries did different work")
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        generate()
        seconds.append(time.perf_counter() - began)
    return {"ids": ids, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="processes per library")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls per process")
    common.output_argument(parser, "decode_vs_peft")
    parser.add_argument("--worker", nargs=3, metavar=("LIBRARY", "SETTING", "DIRECTORY"), help="-")
    arguments = parser.parse_args()
    if arguments.worker:
        library, setting, directory = arguments.worker
        work = {"ours": ours, "peft": peft}
        if library == "prepare":
            print(json.dumps(prepare(Path(directory))))
        else:
            print(json.dumps(work[library](setting, arguments.repeats, Path(directory))))
        return

    rows = []
    with tempfile.TemporaryDirectory() as directory:

        def worker(setting: str, library: str) -> dict[str, Any]:
            repeats = str(arguments.repeats)
            return common.run_worker(
                __file__, "--repeats", repeats, "--worker", library, setting, directory
            )

        worker("", "prepare")
        for setting, (count, _, goal) in SETTINGS.items():
            results = common.take_turns(arguments.rounds, functools.partial(worker, setting))
            seconds = {
                library: statistics.median(s for call in measured for s in call["seconds"])
                for library, measured in results.items()
            }
            ratio = seconds["peft"] / seconds["ours"]
            same = np.equal(results["ours"][0]["ids"], results["peft"][0]["ids"]).all(axis=1)
            rows.append(
                [
                    setting,
                    *(f"{count * NEW / seconds[library]:.1f}" for library in ("ours", "peft")),
                    f"{1000 * seconds['ours'] / NEW:.1f}",
                    f"{1000 * seconds['peft'] / NEW:.1f}",
                    f"{ratio:.2f}x",
                    f">= {goal}x",
                    f"{same.sum()} of {count}",
                ]
            )
    common.write_table(
        arguments.output,
        f"Decoding, SmolLM2-135M float32, prefix {LENGTH}, {NEW} new tokens",
        [
            "work",
            "ours (tokens/s)",
            "PEFT",
            "ours (ms per step)",
            "PEFT",
            "speed",
            "goal",
            "equal texts",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
