"""Speculative decoding with n-gram drafts, against plain decoding and Hugging Face PEFT.

    make bench NAME=drafts

SmolLM2-135M, float32, greedy, prefixes of 8 that were trained on the quickstart's data and, if
`--data` is there, on 300 records of the cleaned E2E data. Each model continues prompts of the
development set until its text ends. PEFT gets the same prefix, and decodes with and without
`prompt_lookup_num_tokens`, which transformers supports for one row only. The libraries run in
separate processes, in turns, after one round that compiles; a cell is the median of the rounds.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np

ROWS, NEW, SLOTS, ROUNDS = (1, 4, 16), 64, 8, 3
PROMPTS, LOOKUP = 16, 10
# name → (input, target, training steps)
TEMPLATES = {
    "stations": ("{facts}\n", "{text}", 100),
    "e2e": (common.INPUT, common.TARGET, 150),
}


def records(name: str, data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training records, and records with different prompts."""
    if name == "stations":
        train, dev = (
            [json.loads(line) for line in (data / file).read_text("utf-8").splitlines()]
            for file in ("train.jsonl", "dev.jsonl")
        )
        return train, dev[:PROMPTS]
    with (data / "train.csv").open(encoding="utf-8", newline="") as file:
        train = random.Random(0).sample(list(csv.DictReader(file)), 300)
    with (data / "dev.csv").open(encoding="utf-8", newline="") as file:
        dev = list({record["mr"]: record for record in csv.DictReader(file)}.values())
    return train, dev[:PROMPTS]


def prepare(name: str, data: Path, exchange: Path) -> dict[str, Any]:
    """Trains a prefix, and writes it and the prompts for both libraries."""
    common.without_torch()
    import prefix_jax as pj
    from prefix_jax.data.source import Record

    train, dev = records(name, data)
    source, target, steps = TEMPLATES[name]
    model = pj.load(common.MODEL, dtype="float32")
    tuned = pj.fit(
        model,
        pj.PrefixTuning(length=SLOTS),
        train,
        input=source,
        target=target,
        steps=steps,
        quiet=True,
    )
    tuned.save(exchange / "prefix")
    prefix: Any = tuned.prefix
    inside = prefix.decoder.inside
    np.savez(exchange / "prefix.npz", k_LPKH=inside.k_LPKH, v_LPKH=inside.v_LPKH)
    ids = [list(tuned.task.prompt(Record(record, "a"), tuned.reader).ids) for record in dev]
    (exchange / "prompts.json").write_text(json.dumps([[int(i) for i in row] for row in ids]))
    return {}


def ours(rows: int, rounds: int, exchange: Path) -> dict[str, Any]:
    """Decodes with drafts and without, in turns."""
    common.without_torch()
    import prefix_jax as pj

    model = pj.load(common.MODEL, dtype="float32")
    prompts = json.loads((exchange / "prompts.json").read_text())
    engines = {
        kind: pj.Engine(model, {"a": exchange / "prefix"}, rows=rows, num_speculative_tokens=number)
        for kind, number in (("plain", 0), ("drafts", None))
    }

    def generate(engine: Any) -> list[list[int]]:
        results = engine.generate(prompts, "a", max_new_tokens=NEW)
        return [list(result.samples[0].ids) for result in results]

    results = _timed({kind: functools.partial(generate, x) for kind, x in engines.items()}, rounds)
    stats = engines["drafts"].stats
    return {
        **results,
        "tokens_per_step": stats.generated_tokens / stats.row_steps,
        "drafted": stats.drafted_tokens,
        "accepted": stats.accepted_tokens,
    }


def peft(rows: int, rounds: int, exchange: Path) -> dict[str, Any]:
    """Decodes with PEFT, with prompt lookup and without."""
    import torch

    model = common.peft_model(np.load(exchange / "prefix.npz"), SLOTS).eval()
    prompts = json.loads((exchange / "prompts.json").read_text())

    def generate(**options: Any) -> list[list[int]]:
        texts = []
        for first in range(0, len(prompts), rows):
            batch = prompts[first : first + rows]
            width = max(map(len, batch))
            missing = [width - len(row) for row in batch]
            ids_BT = torch.tensor([[0] * n + row for n, row in zip(missing, batch, strict=True)])
            mask_BT = torch.tensor(
                [[0] * n + [1] * (width - n) for n in missing], dtype=torch.int64
            )
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids_BT,
                    attention_mask=mask_BT,
                    max_new_tokens=NEW,
                    do_sample=False,
                    pad_token_id=0,
                    **options,
                )
            texts += out[:, width:].tolist()
        return texts

    work: dict[str, Callable[[], list[list[int]]]] = {"peft": generate}
    if rows == 1:
        work["lookup"] = functools.partial(generate, prompt_lookup_num_tokens=LOOKUP)
    return _timed(work, rounds)


def _timed(work: Mapping[str, Callable[[], list[list[int]]]], rounds: int) -> dict[str, Any]:
    """The texts and the durations of each piece of work, measured in turns. One that fails has
    its error instead."""
    results: dict[str, Any] = {}
    for number in range(rounds + 1):
        for name, call in work.items():
            if "error" in results.setdefault(name, {"seconds": []}):
                continue
            began = time.perf_counter()
            try:
                results[name]["ids"] = call()
            except Exception as error:  # whatever the other library raises is a result, too
                if name != "lookup":
                    raise
                results[name]["error"] = f"{type(error).__name__}: {error}"
                continue
            if number:
                results[name]["seconds"].append(time.perf_counter() - began)
    return results


def line(name: str, rows: int, mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The cells of one line."""
    # Texts without what follows their end.
    texts = mine["plain"]["ids"]
    tokens = sum(map(len, texts))

    def speed(result: dict[str, Any] | None) -> float | None:
        if result is None or "error" in result:
            return None
        return tokens / statistics.median(result["seconds"])

    plain, drafts = speed(mine["plain"]), speed(mine["drafts"])
    assert plain is not None
    assert drafts is not None
    other = [speed(theirs["peft"]), speed(theirs.get("lookup"))]
    if "error" in theirs.get("lookup", {}):
        print(f"PEFT with prompt lookup: {theirs['lookup']['error']}")
    same = sum(a == b for a, b in zip(texts, mine["drafts"]["ids"], strict=True))
    equal = sum(
        row[: len(text)] == text for text, row in zip(texts, theirs["peft"]["ids"], strict=True)
    )
    return [
        f"{name}, {rows} row{'s' * (rows > 1)}",
        f"{mine['tokens_per_step']:.2f}",
        f"{drafts:.1f}",
        f"{plain:.1f}",
        f"{drafts / plain:.2f}x",
        {1: ">= 1.7x", 16: ">= 1x"}.get(rows, ""),
        *("" if x is None else f"{x:.1f}" for x in other),
        f"{same} and {equal} of {len(texts)}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=common.E2E, help="the cleaned E2E data")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measured rounds")
    common.output_argument(parser, "drafts")
    parser.add_argument("--worker", nargs=4, metavar=("WORK", "NAME", "ROWS", "FOLDER"), help="-")
    arguments = parser.parse_args()
    data = {"stations": common.ROOT / "examples" / "stations", "e2e": arguments.data}
    if arguments.worker:
        work, name, rows, folder = arguments.worker
        if work == "prepare":
            print(json.dumps(prepare(name, data[name], Path(folder))))
        else:
            call = {"ours": ours, "peft": peft}[work]
            print(json.dumps(call(int(rows), arguments.rounds, Path(folder))))
        return

    lines = []
    for name, folder in data.items():
        if not folder.is_dir():
            print(f"{name} is left out: no folder {folder}")
            continue
        with tempfile.TemporaryDirectory() as exchange:

            def worker(
                work: str, rows: int, name: str = name, exchange: str = exchange
            ) -> dict[str, Any]:
                options: Sequence[str] = ("--data", str(arguments.data.resolve()))
                options = (*options, "--rounds", str(arguments.rounds))
                return common.run_worker(
                    __file__, *options, "--worker", work, name, str(rows), exchange
                )

            worker("prepare", 0)
            for rows in arguments.rows:
                lines.append(line(name, rows, worker("ours", rows), worker("peft", rows)))
    common.write_table(
        arguments.output,
        f"Speculative decoding, SmolLM2-135M float32, a prefix of {SLOTS}, {PROMPTS} prompts, up "
        f"to {NEW} new tokens",
        [
            "data",
            "tokens per step",
            "drafts (tokens/s)",
            "plain",
            "speed",
            "goal",
            "PEFT",
            "PEFT, prompt lookup",
            "equal texts, plain and PEFT",
        ],
        lines,
    )


if __name__ == "__main__":
    main()
