"""Peak host memory of loading a backbone.

    python benchmarks/load_memory.py [--source PATH] [--output benchmarks/results/load_memory.md]

Goal: the size of the model in its target dtype plus the largest stacked parameter. int8 and int4
weights come from a bfloat16 model and are quantised while loading. Each load runs in a separate
process, which loads a tiny model first, so that the baseline includes most of the memory of JAX and
its compiler. The peak is the kernel's (VmHWM, reset before the load): Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

MB = 2**20
CASES = (
    ("float32", 1),
    ("float32", 4),
    ("bfloat16", 1),
    ("bfloat16", 4),
    ("int8", 1),
    ("int8", 4),
    ("int4", 1),
)


def write_llama(directory: Path, *, L: int, D: int, F: int, V: int, dtype: str) -> Path:
    """Writes random weights of a Llama in Hugging Face layout."""
    directory.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "num_hidden_layers": L,
        "hidden_size": D,
        "intermediate_size": F,
        "num_attention_heads": D // 64,
        "num_key_value_heads": D // 64,
        "vocab_size": V,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))

    def weight(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(kind)

    tensors = {"model.embed_tokens.weight": weight(V, D), "model.norm.weight": weight(D)}
    for layer in range(L):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = weight(D)
        for part in "qkvo":
            tensors[f"{name}.self_attn.{part}_proj.weight"] = weight(D, D)
        tensors[f"{name}.mlp.gate_proj.weight"] = weight(F, D)
        tensors[f"{name}.mlp.up_proj.weight"] = weight(F, D)
        tensors[f"{name}.mlp.down_proj.weight"] = weight(D, F)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _status(key: str) -> int:
    """Reads a value of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _child(tiny: str, source: str, dtype: str, devices: int) -> None:
    """Loads a model and prints the results; runs in a separate process."""
    import jax

    from prefix_jax.backbones.loading.pretrained import load
    from prefix_jax.mesh import make_mesh

    mesh = make_mesh(1, devices, 1) if devices > 1 else None
    how = {"dtype": "bfloat16", "quantize": dtype} if dtype.startswith("int") else {"dtype": dtype}
    load(tiny, **how, mesh=mesh)
    gc.collect()
    baseline = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    params = jax.block_until_ready(load(source, **how, mesh=mesh).params)
    seconds = time.perf_counter() - start
    leaves = jax.tree.leaves(params)
    sizes = [leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) // 8 for leaf in leaves]
    figures = {
        "dtype": dtype,
        "devices": devices,
        "model_mb": sum(sizes) / MB,
        "bound_mb": (sum(sizes) + max(sizes)) / MB,
        "peak_mb": (_status("VmHWM") - baseline) / MB,
        "seconds": seconds,
    }
    print(json.dumps(figures))


def measure(tiny: Path, source: str, dtype: str, devices: int) -> dict[str, float]:
    """Measures one load in a separate process."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": "",
        # As users run it: the tests compile unoptimised programs, which write out temporaries, and
        # have more threads than cores, each of which keeps memory.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "NPROC": str(os.cpu_count()),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, __file__, "--child", str(tiny), source, dtype, str(devices)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    import common

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="an additional model to measure")
    common.output_argument(parser, "load_memory")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tiny = write_llama(root / "tiny", L=2, D=64, F=64, V=16, dtype="float32")
        runs = []
        for stored in ("bfloat16", "float32"):
            model = write_llama(root / stored, L=12, D=512, F=2048, V=8000, dtype=stored)
            runs += [("random", stored, str(model), dtype, n) for dtype, n in CASES]
        if arguments.source:
            runs += [(arguments.source, "", arguments.source, dtype, n) for dtype, n in CASES]
        for name, stored, source, dtype, devices in runs:
            result = measure(tiny, source, dtype, devices)
            sizes = [f"{result[key]:.0f}" for key in ("model_mb", "bound_mb", "peak_mb")]
            rows.append([name, stored, dtype, devices, *sizes, f"{result['seconds']:.1f}"])
            print(*rows[-1], flush=True)
    columns = ("model", "stored", "loaded", "devices", "MB", "MB with the largest tensor")
    common.write_table(
        arguments.output,
        "Peak host memory of loading a model",
        [*columns, "peak MB", "seconds"],
        rows,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(*sys.argv[2:5], int(sys.argv[5]))
    else:
        main()
