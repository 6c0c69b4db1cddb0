"""Decoding with a prefix per row against one prefix for all rows, and against the bare model.

    make bench NAME=mixed_prefixes

SmolLM2-135M, float32, prompts of the cleaned E2E data, new tokens without end of text. All work
runs in one process and in turns, after one round that compiles; a cell is the median of the rounds.
A row of the engine is as wide as the longest one, so prefixes of different lengths are measured
against one of their mean length, and against prompts as long as prefix and prompt together.

The last two lines serve a stream of requests through 16 rows: each with one of 1,000 prefixes,
chosen with a probability inverse to its rank, and all with one prefix. The device has room for 100
of the 1,000.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import common
import numpy as np

ROWS, NEW, ROUNDS = 16, 64, 3
# Two prefixes of each length.
LENGTHS = (8, 16, 24, 32, 40, 48, 56, 64) * 2
REGISTERED, ON_DEVICE, REQUESTS, SHORT = 1000, 100, 96, 32


def prompts(count: int) -> list[str]:
    """The first distinct inputs of the development set."""
    with common.e2e("dev.csv").open(encoding="utf-8", newline="") as file:
        records = list(dict.fromkeys(record["mr"] for record in csv.DictReader(file)))
    return [common.INPUT.format(mr=mr) for mr in records[:count]]


class Bench:
    """The model, and engines whose prefixes are filled at random."""

    def __init__(self) -> None:
        from prefix_jax.backbones.loading.pretrained import load

        self.model = load(common.MODEL, dtype="float32")
        self.model.unstacked()
        self.prompts = self.model.tokenizer(prompts(REQUESTS))["input_ids"]
        self.rng = np.random.default_rng(0)

    def prefix(self, length: int) -> Any:
        """A prefix that distinguishes rows but hardly disturbs the model."""
        from prefix_jax.prefix import KVPrefix, Prefix, Site

        shape = self.model.backbone.geometry.main
        size = (2, shape.layers, length, shape.kv_heads, shape.head_dim)
        k, v = 0.3 * self.rng.normal(size=size).astype(np.float32)
        return Prefix(Site(KVPrefix(k, v)), text_position=length)

    def engine(self, lengths: Sequence[int], **options: Any) -> Any:
        """An engine with prefixes named by their number."""
        from prefix_jax.artifact import BackboneCard, make_card
        from prefix_jax.engine import EngineCore

        core = EngineCore(self.model, **{"rows": ROWS, "num_speculative_tokens": 0, **options})
        backbone = BackboneCard(
            source=common.MODEL, model_type="llama", fingerprint="", dtype="float32"
        )
        for number, length in enumerate(lengths):
            prefix = self.prefix(length)
            card = make_card(prefix, self.model.backbone.geometry, backbone)
            core.bank.add(str(number), prefix, card, (), None)
        return core

    def serve(
        self, core: Any, ids: Sequence[Sequence[int]], names: Sequence[str | None], new: int
    ) -> list[tuple[int, ...]]:
        """Generates text for requests; returns their tokens."""
        from prefix_jax.config import DecodeConfig
        from prefix_jax.engine import Request

        config = DecodeConfig(max_new_tokens=new, min_new_tokens=new)
        handles = [
            core.submit(Request(prompt, name, config))
            for prompt, name in zip(ids, names, strict=True)
        ]
        while not core.idle:
            core.step()
        return [handle.generation.samples[0].ids for handle in handles]


def batches(bench: Bench) -> dict[str, Callable[[int], Any]]:
    """The work of the first lines: functions of the number of new tokens."""
    from prefix_jax.config import DecodeConfig
    from prefix_jax.decode import Generator

    mean = sum(LENGTHS) // ROWS
    core = bench.engine([*LENGTHS, mean])
    ids = bench.prompts[:ROWS]
    longer = [
        [*map(int, bench.rng.integers(100, 40_000, length)), *prompt]
        for prompt, length in zip(ids, LENGTHS, strict=True)
    ]
    names = [str(number) for number in range(ROWS)]
    bare = Generator(bench.model.backbone, bench.model.params, bench.model.tokenizer, None, eos=())
    return {
        f"{ROWS} prefixes of {min(LENGTHS)} to {max(LENGTHS)} slots": lambda new: bench.serve(
            core, ids, names, new
        ),
        f"one prefix of {mean} slots": lambda new: bench.serve(core, ids, [str(ROWS)] * ROWS, new),
        "no prefix, prompts of the same total length": lambda new: bench.serve(
            core, longer, [None] * ROWS, new
        ),
        "the same with Generator": lambda new: bare.generate(
            longer, DecodeConfig(max_new_tokens=new, min_new_tokens=new)
        ),
    }


def streams(bench: Bench) -> dict[str, Callable[[int], Any]]:
    """The work of the last lines."""
    size = bench.engine([16]).bank.find("0").bytes
    core = bench.engine([16] * REGISTERED, device_bytes=ON_DEVICE * size)
    ids = [
        prompt for prompt, _ in zip(itertools.cycle(bench.prompts), range(REQUESTS), strict=False)
    ]
    weights = 1 / np.arange(1, REGISTERED + 1)

    def popular(new: int) -> Any:
        # New requests in every round.
        numbers = bench.rng.choice(REGISTERED, REQUESTS, p=weights / weights.sum())
        return bench.serve(core, ids, list(map(str, numbers)), new)

    return {
        f"{REGISTERED:,} prefixes by popularity": popular,
        "one of them": lambda new: bench.serve(core, ids, ["0"] * REQUESTS, new),
    }


def seconds(work: dict[str, Callable[[int], Any]], new: int, rounds: int) -> dict[str, float]:
    """The median duration of each piece of work, measured in turns."""
    measured: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, call in work.items():
            began = time.perf_counter()
            call(new)
            if number:
                measured[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in measured.items()}


def equal_texts(bench: Bench) -> int:
    """Counts the rows with different prefixes whose tokens equal those of separate decoding."""
    bench.rng = np.random.default_rng(1)
    together = bench.engine(LENGTHS)
    bench.rng = np.random.default_rng(1)
    alone = bench.engine(LENGTHS, rows=1)
    ids, names = bench.prompts[:ROWS], [str(number) for number in range(ROWS)]
    rows = bench.serve(together, ids, names, NEW)
    return sum(
        bench.serve(alone, [prompt], [name], NEW) == [row]
        for prompt, name, row in zip(ids, names, rows, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measured rounds")
    common.output_argument(parser, "mixed_prefixes")
    arguments = parser.parse_args()
    common.without_torch()
    bench = Bench()

    work = batches(bench)
    whole = seconds(work, NEW, arguments.rounds)
    first = seconds(work, 1, arguments.rounds)
    mixed, *_ = work
    rows = []
    for name in work:
        decoding = (whole[name] - first[name]) / (NEW - 1)
        speed = whole[name] / whole[mixed]
        per_step = (whole[name] - first[name]) / (whole[mixed] - first[mixed])
        rows.append(
            [
                name,
                f"{ROWS * NEW / whole[name]:.1f}",
                f"{1000 * decoding:.1f}",
                "" if name == mixed else f"{speed:.2f}x",
                "" if name == mixed else f"{per_step:.2f}x",
                {1: ">= 0.97x", 3: ">= 0.95x"}.get(len(rows), ""),
            ]
        )
    work = streams(bench)
    stream = seconds(work, SHORT, arguments.rounds)
    popular, rare = stream
    for name in work:
        rows.append(
            [
                f"{REQUESTS} requests: {name}",
                f"{REQUESTS * SHORT / stream[name]:.1f}",
                "",
                "" if name == popular else f"{stream[rare] / stream[popular]:.2f}x",
                "",
                "" if name == popular else ">= 0.9x",
            ]
        )
    equal = equal_texts(bench)
    common.write_table(
        arguments.output,
        f"Prefixes per row, SmolLM2-135M float32, {ROWS} rows, {NEW} new tokens; "
        f"{equal} of {ROWS} texts equal separate decoding",
        [
            "work",
            "tokens/s",
            "decoding (ms per step)",
            "mixed against this",
            "decoding only",
            "goal",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
