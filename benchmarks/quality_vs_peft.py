"""Quality against Hugging Face PEFT on PyTorch, at equal budget.

    make bench NAME=quality_vs_peft

SmolLM2-135M, float32, prefix length 16, 300 steps of 8 examples of the cleaned E2E data, AdamW with
a linear schedule. Both libraries receive the same examples in the same order. PEFT runs with each
of three initialisations: random (its default), zero, and the keys and values of a text, which are
also our initialisation. Measured on the held-out inputs of dev.csv: mean loss per target token, and
BLEU of greedy decoding against all references of an input.

Each run needs about half an hour on two cores. The table is written after each run; runs that it
already contains, with the same number of steps, are skipped.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np

LENGTH, BATCH, RATE, NEW_TOKENS, ROWS = 16, 8, 1e-2, 64, 16


def _config(steps: int, output: Path) -> Any:
    """Our config of the run."""
    from prefix_jax.config import parse

    values = {
        "model": {"path": common.MODEL, "dtype": "float32"},
        "method": {"name": "prefix", "length": LENGTH},
        "data": {
            "train": str(common.e2e("train.csv")),
            "test": str(common.e2e("dev.csv")),
            "input": common.INPUT,
            "target": common.TARGET,
            "batch_size": BATCH,
        },
        "optim": {"learning_rate": RATE, "schedule": "linear"},
        "train": {"steps": steps, "checkpoint_every": steps},
        "evaluate": {"metrics": ["loss", "bleu"], "batch_size": ROWS},
        "decode": {"max_new_tokens": NEW_TOKENS},
        "output_dir": str(output),
    }
    return parse(values)


def ours(steps: int, exchange: Path) -> dict[str, Any]:
    """Trains and measures ours."""
    from prefix_jax.runs.run import run

    result = run(_config(steps, exchange / "run"), quiet=True)
    metrics = result.evaluations["after"].report.metrics
    return {"loss": metrics["loss"], "bleu": metrics["bleu"]}


def examples(steps: int, exchange: Path) -> dict[str, Any]:
    """Saves our examples, in order, and the initial prefix for PEFT."""
    from prefix_jax.runs.build import build_run

    built = build_run(_config(steps, exchange / "run"))
    train, dev = built.splits["train"], built.splits["test"]
    order = [i for step in range(steps) for i in built.pipeline.sampler.step(step)]
    inputs = built.model.task.inputs(dev)
    prefix = {
        name: np.asarray(leaf)
        for name, leaf in built.program.state.train["prefix"]["decoder"].items()
    }
    np.savez(exchange / "prefix.npz", **prefix)
    exchanged = {
        "train": [[train[i].ids_T.tolist(), train[i].target_T.tolist()] for i in order],
        "dev": [[example.ids_T.tolist(), example.target_T.tolist()] for example in dev],
        "prompts": [example.ids_T[: example.prompt_length].tolist() for example in inputs],
        "references": [list(example.references) for example in inputs],
        "eos": built.pretrained.tokenizer.eos_token_id,
    }
    (exchange / "data.json").write_text(json.dumps(exchanged))
    return {"examples": len(order)}


def peft(init: str, steps: int, exchange: Path) -> dict[str, Any]:
    """Trains and measures PEFT from one initialisation."""
    import torch
    from transformers import get_linear_schedule_with_warmup

    from prefix_jax.backbones.loading.find import find
    from prefix_jax.backbones.loading.tokenizer import load_tokenizer
    from prefix_jax.tasks.metrics import score

    data = json.loads((exchange / "data.json").read_text())
    model = common.peft_model(np.load(exchange / "prefix.npz") if init == "text" else None, LENGTH)
    weight = model.prompt_encoder["default"].embedding.weight
    if init == "zero":
        torch.nn.init.zeros_(weight)
    optimizer = torch.optim.AdamW([weight], lr=RATE, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)

    def batches(rows: list[Any], size: int) -> list[dict[str, Any]]:
        pairs = [(np.asarray(ids), np.asarray(target)) for ids, target in rows]
        return [common.padded(pairs[i : i + size], pad=0) for i in range(0, len(pairs), size)]

    model.train()
    for batch in batches(data["train"], BATCH):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    model.eval()
    total = count = 0.0
    texts = []
    tokenizer = load_tokenizer(find(common.MODEL))
    with torch.no_grad():
        for batch in batches(data["dev"], ROWS):
            targets = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch).loss) * targets
            count += targets
        for start in range(0, len(data["prompts"]), ROWS):
            prompts = data["prompts"][start : start + ROWS]
            width = max(map(len, prompts))
            # Generation requires left padding.
            ids = torch.tensor([[data["eos"]] * (width - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=data["eos"],
                pad_token_id=data["eos"],
            )
            texts += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    bleu = score(["bleu"], [text.strip() for text in texts], data["references"])["bleu"]
    return {"loss": total / count, "bleu": bleu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--inits",
        nargs="+",
        default=["text", "zero", "random"],
        help="PEFT's initialisation (default: all)",
    )
    common.output_argument(parser, "quality_vs_peft")
    parser.add_argument("--worker", nargs=2, metavar=("LIBRARY", "DIRECTORY"), help="-")
    arguments = parser.parse_args()
    if arguments.worker:
        name, directory = arguments.worker
        where = Path(directory)
        named = {"ours": ours, "examples": examples}
        worker = named[name] if name in named else functools.partial(peft, name)
        print(json.dumps(worker(arguments.steps, where)))
        return

    common.e2e("dev.csv")
    title = f"Quality on E2E dev after {arguments.steps} steps of {BATCH}, SmolLM2-135M, prefix 16"
    names = {"ours": "prefix_jax (text)", **{init: f"PEFT ({init})" for init in arguments.inits}}
    rows = common.read_rows(arguments.output, title)
    with tempfile.TemporaryDirectory() as directory:
        run = functools.partial(
            common.run_worker, __file__, "--steps", str(arguments.steps), "--worker"
        )
        for library, name in names.items():
            if name in rows:
                continue
            if library != "ours" and not (Path(directory) / "data.json").exists():
                run("examples", directory)
            result = run(library, directory)
            rows[name] = [name, f"{result['loss']:.4f}", f"{result['bleu']:.2f}"]
            columns = ["(goal: PEFT's best)", "token loss (nats)", "BLEU"]
            common.write_table(arguments.output, title, columns, list(rows.values()))


if __name__ == "__main__":
    main()
