"""Training speed and memory against Hugging Face PEFT on PyTorch.

    make bench NAME=train_vs_peft

SmolLM2-135M, float32, prefix tuning of length 16 on the cleaned E2E data, AdamW, 8 examples per
step. Both libraries receive the same examples in every step, start from the same prefix and report
the same loss. Each measurement runs in a separate process, with the libraries alternating. Timing
starts after warm-up (every shape compiled); memory is the peak after loading, including
compilation.

    random    the data is shuffled
    grouped   sampled as with `group_by_source: true`: the targets of a source are adjacent

Ours also runs with `optim.grad_accum_steps: 2`, the same steps in two micro-batches, which needs
less memory and more time.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

LENGTH, BATCH, RATE = 16, 8, 1e-2
GOALS = {"random": 1.7, "grouped": 2.2}
MEMORY_GOAL = 0.6
# Our variants, by the number of micro-batches.
OURS = {"ours": 1, "halves": 2}


def build(order: str, steps: int, micro: int) -> Any:
    """Sets up our run with `micro` micro-batches. Its pipeline also defines PEFT's batches."""
    from prefix_jax.config import parse
    from prefix_jax.runs.build import build_run

    values = {
        "model": {"path": common.MODEL, "dtype": "float32"},
        "method": {"name": "prefix", "length": LENGTH},
        "data": {
            "train": str(common.e2e("train.csv")),
            "input": common.INPUT,
            "target": common.TARGET,
            "batch_size": BATCH,
            "group_by_source": order == "grouped",
        },
        "optim": {
            "learning_rate": RATE,
            "schedule": "constant",
            "clip_norm": None,
            "grad_accum_steps": micro,
        },
        "train": {"steps": steps},
        "output_dir": "unused",
    }
    return build_run(parse(values))


def ours(micro: int, order: str, steps: int, exchange: Path) -> dict[str, Any]:
    """Times our steps, and saves the batches and the prefix for PEFT."""
    common.without_torch()
    import jax

    from prefix_jax.mesh import place_rows

    built = build(order, steps, micro)
    train, prefix = built.splits["train"], built.program.state.train["prefix"]["decoder"]
    chosen = [list(built.pipeline.sampler.step(step)) for step in range(steps)]
    np.savez(
        exchange / f"{order}.npz",
        **{name: np.asarray(leaf) for name, leaf in prefix.items()},
        **{f"ids_{s}_{n}": train[i].ids_T for s, c in enumerate(chosen) for n, i in enumerate(c)},
        **{
            f"target_{s}_{n}": train[i].target_T
            for s, c in enumerate(chosen)
            for n, i in enumerate(c)
        },
    )
    batches = [built.pipeline.batch(step) for step in range(steps)]
    if micro == 1:
        batches = [jax.tree.map(lambda leaf: leaf[None], batch) for batch in batches]
    common.reset_peak()
    state, losses, seconds = built.program.state, [], []
    with jax.set_mesh(built.mesh):
        placed = [place_rows(batch, built.mesh, leading=1) for batch in batches]
        warm = jax.tree.map(jax.numpy.copy, state)
        shapes = {batch.ids_BT.shape + batch.label_BM.shape: batch for batch in placed}
        for batch in shapes.values():
            warm, _ = built.program.step(warm, built.program.frozen, batch)
        jax.block_until_ready(warm)
        for batch in placed:
            began = time.perf_counter()
            state, metrics = built.program.step(state, built.program.frozen, batch)
            losses.append(float(metrics.loss))
            seconds.append(time.perf_counter() - began)
    laid = sum(batch.ids_BT.size for batch in batches)
    return _result(seconds, losses, laid) | {"shapes": len(shapes)}


def peft(order: str, steps: int, exchange: Path) -> dict[str, Any]:
    """Times PEFT's steps on the same batches."""
    import torch

    given = np.load(exchange / f"{order}.npz")
    model = common.peft_model(given, LENGTH)
    batches = [
        common.padded(
            [(given[f"ids_{s}_{n}"], given[f"target_{s}_{n}"]) for n in range(BATCH)], pad=0
        )
        for s in range(steps)
    ]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    model.train()
    common.reset_peak()

    def step(batch: dict[str, Any], update: bool) -> float:
        loss = model(**batch).loss
        loss.backward()
        if update:
            optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    for batch in batches[:2]:
        step(batch, update=False)
    losses, seconds = [], []
    for batch in batches:
        began = time.perf_counter()
        losses.append(step(batch, update=True))
        seconds.append(time.perf_counter() - began)
    return _result(seconds, losses, sum(batch["input_ids"].numel() for batch in batches))


def _result(seconds: list[float], losses: list[float], laid: int) -> dict[str, Any]:
    return {
        "examples_per_second": BATCH * len(seconds) / sum(seconds),
        "peak_mib": common.peak_mib(),
        "losses": losses,
        "tokens_laid": laid,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=16, help="timed steps per measurement")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per library")
    common.output_argument(parser, "train_vs_peft")
    parser.add_argument("--worker", nargs=3, metavar=("LIBRARY", "ORDER", "DIRECTORY"), help="-")
    arguments = parser.parse_args()
    if arguments.worker:
        library, order, directory = arguments.worker
        work = functools.partial(ours, OURS[library]) if library in OURS else peft
        print(json.dumps(work(order, arguments.steps, Path(directory))))
        return

    common.e2e("train.csv")
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as directory:

        def worker(order: str, library: str) -> dict[str, Any]:
            steps = str(arguments.steps)
            return common.run_worker(
                __file__, "--steps", steps, "--worker", library, order, directory
            )

        for order, goal in GOALS.items():
            results = common.take_turns(
                arguments.repeats, functools.partial(worker, order), ("ours", "peft", "halves")
            )
            speed, memory = (
                {k: statistics.median(r[key] for r in v) for k, v in results.items()}
                for key in ("examples_per_second", "peak_mib")
            )
            for library, micro in OURS.items():
                losses = zip(
                    results[library][0]["losses"], results["peft"][0]["losses"], strict=True
                )
                gap = max(abs(a - b) for a, b in losses)
                ratio, share = speed[library] / speed["peft"], memory[library] / memory["peft"]
                rows.append(
                    [
                        order if micro == 1 else f"{order}, grad_accum_steps: {micro}",
                        f"{speed[library]:.2f}",
                        f"{speed['peft']:.2f}",
                        f"{ratio:.2f}x",
                        f">= {goal}x",
                        f"{memory[library]:.0f}",
                        f"{memory['peft']:.0f}",
                        f"{share:.2f}x",
                        f"<= {MEMORY_GOAL}x",
                        f"{gap:.1e}",
                    ]
                )
    common.write_table(
        arguments.output,
        "Training, SmolLM2-135M float32, prefix 16, 8 examples per step",
        [
            "batches",
            "ours (examples/s)",
            "PEFT",
            "speed",
            "goal",
            "ours (peak MiB)",
            "PEFT",
            "memory",
            "goal",
            "largest loss gap",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
