"""Computation and memory of one training step, compared with the minimum.

    python benchmarks/step_audit.py [--output benchmarks/results/step_audit.md]

Steps are compiled for this machine from abstract weights: nothing is allocated and nothing runs.
Goals, without remat: at most 1.05 times the floor (`prefix_jax.plan.floor`), no product that
computes the gradient of a frozen weight, no array as large as a parameter of the backbone, and
optimizer state only for trained leaves. For comparison, the "full" rows train the whole backbone.

XLA's CPU compiler computes bfloat16 products in float32 and converts whole stacks of weights for
them, which causes the weight copies in the bfloat16 rows.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.loading.config import architecture
from prefix_jax.config import OptimConfig
from prefix_jax.data.batch import Batch, Source
from prefix_jax.methods import METHODS
from prefix_jax.model import PrefixModel
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.nn.remat import Remat
from prefix_jax.plan.audit import Audit, audit
from prefix_jax.plan.floor import floor
from prefix_jax.train.optimizer import make_optimizer, make_schedule
from prefix_jax.train.partition import labels, merge, split
from prefix_jax.train.step import TrainState, make_step

MIB = 2**20

# Hugging Face configs.
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
    "tiny-T5": {
        "model_type": "t5",
        "num_layers": 4,
        "num_decoder_layers": 3,
        "d_model": 64,
        "d_kv": 20,
        "d_ff": 160,
        "num_heads": 4,
        "vocab_size": 512,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    },
    "SmolLM2-135M": {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "Llama-3-8B": {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One step: a model, a method, and the shape of a batch of one row.

    Attributes:
        model: a name in `CONFIGS`.
        method: a name in `METHODS`, or "full" for training the backbone without a prefix.
        tokens, targets, length: T, M and P.
        source: S, the encoder tokens; 0 for a decoder.
    """

    model: str
    method: str
    tokens: int
    targets: int
    length: int
    dtype: str = "float32"
    remat: Remat = "none"
    source: int = 0


# Sizes for which no activation is as large as a weight; see `audit`.
TINY = Case("tiny", "prefix", tokens=72, targets=24, length=8)
TINY_T5 = Case("tiny-T5", "prefix", tokens=36, targets=28, length=8, source=84)
SMOLLM2 = Case("SmolLM2-135M", "prefix", tokens=512, targets=224, length=16)
LLAMA = Case("Llama-3-8B", "prefix", tokens=1920, targets=840, length=32)

CASES = (
    *(
        dataclasses.replace(case, method=method)
        for case in (TINY, SMOLLM2, LLAMA)
        for method in ("prefix", "hidden", "prompt", "adapter", "plus", "full")
    ),
    *(dataclasses.replace(TINY_T5, method=method) for method in ("prefix", "prompt")),
    dataclasses.replace(SMOLLM2, tokens=40, targets=24),
    dataclasses.replace(SMOLLM2, remat="full"),
    dataclasses.replace(LLAMA, dtype="bfloat16"),
)


def model_of(case: Case) -> PrefixModel:
    backbone = Backbone(architecture(CONFIGS[case.model], case.model), case.remat)
    method = METHODS.get(case.method)
    if method is None:
        return PrefixModel(backbone, None)
    return PrefixModel(backbone, method(case.length) if method.slots else method())


def compile_step(
    case: Case, make: Callable[..., Any] = make_step
) -> tuple[jax.stages.Compiled, Mapping[str, Any], TrainState]:
    """The compiled step, the abstract backbone and the abstract state.

    Args:
        case: what to compile.
        make: (model, optimizer) → step, like `make_step`.
    """
    model = model_of(case)

    def init() -> dict[str, Any]:
        params: dict[str, Any] = {"backbone": model.backbone.init(jax.random.key(0), case.dtype)}
        if model.method is not None:
            params["prefix"] = model.method.init(jax.random.key(1), model.backbone.geometry, None)
        return params

    params = jax.eval_shape(init)
    partition = labels(params, full=model.method is None)
    config = OptimConfig()
    optimizer = make_optimizer(config, make_schedule(config, 100), partition)
    train, frozen = split(params, partition)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, train, jax.eval_shape(optimizer.init, merge(train, frozen)))

    def integers(size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, 1, size), jnp.int32)

    T, M, S = case.tokens, case.targets, case.source
    batch = Batch(
        ids_BT=integers(T),
        layout=TokenLayout(integers(T), None, integers(T)),
        index_BM=integers(M),
        label_BM=integers(M),
        weight_BM=jax.ShapeDtypeStruct((1, 1, M), jnp.float32),
        examples=jax.ShapeDtypeStruct((1,), jnp.float32),
        source=Source(integers(S), TokenLayout(integers(S), None, integers(S))) if S else None,
    )
    lowered = jax.jit(make(model, optimizer), donate_argnums=0).lower(state, frozen, batch)
    # Nothing runs, so only the HLO needs optimising: skip LLVM's optimisation of machine code.
    compiled = lowered.compile({"xla_backend_optimization_level": 0})
    return compiled, params["backbone"], state


def floor_of(case: Case) -> int:
    """The floor of a case; for "full", that of a frozen backbone without a prefix."""
    model = model_of(case)
    geometry, method = model.backbone.geometry, model.method
    produced = None
    if method is not None:
        produced = jax.eval_shape(lambda: method(method.init(jax.random.key(0), geometry, None)))
    return floor(
        model.backbone.arch,
        rows=1,
        tokens=case.tokens,
        targets=case.targets,
        produced=produced,
        source=case.source,
    ).total


def main() -> None:
    import common

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.output_argument(parser, "step_audit")
    output = parser.parse_args().output

    rows = []
    for case in CASES:
        compiled, backbone, state = compile_step(case)
        row = figures(case, audit(compiled, backbone, state))
        rows.append([form(row) for form in COLUMNS.values()])
        print(", ".join(f"{title} {cell}" for title, cell in zip(COLUMNS, rows[-1], strict=True)))
    title = f"Work and memory of one training step, compiled for {jax.devices()[0].device_kind}"
    common.write_table(output, title, list(COLUMNS), rows)


def figures(case: Case, audit: Audit) -> dict[str, Any]:
    """Returns the values of one row of the table."""
    least = floor_of(case)
    return {
        **dataclasses.asdict(case),
        "flops": audit.flops,
        "floor": least,
        "ratio": audit.flops / least,
        "weight_gradients": sum(product.count for product in audit.weight_gradients),
        "weight_copies": [str(array) for array in audit.weight_copies],
        "temp_bytes": audit.temp_bytes,
        "backbone_bytes": audit.backbone_bytes,
        "largest_array": str(audit.largest),
        "train_elements": audit.train_elements,
        "optimizer_elements": audit.optimizer_elements,
        "not_counted": audit.opaque,
    }


Row = dict[str, Any]
COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row["model"],
    "method": lambda row: row["method"],
    "dtype": lambda row: row["dtype"],
    "remat": lambda row: row["remat"],
    "S": lambda row: str(row["source"]),
    "T": lambda row: str(row["tokens"]),
    "M": lambda row: str(row["targets"]),
    "P": lambda row: str(row["length"]),
    "GFLOP": lambda row: f"{row['flops'] / 1e9:.6g}",
    "floor": lambda row: f"{row['floor'] / 1e9:.6g}",
    "ratio": lambda row: f"{row['ratio']:.3f}",
    "temp MiB": lambda row: f"{row['temp_bytes'] / MIB:.1f}",
    "backbone MiB": lambda row: f"{row['backbone_bytes'] / MIB:.1f}",
    "weight grads": lambda row: str(row["weight_gradients"]),
    "copies": lambda row: str(len(row["weight_copies"])),
    "trained": lambda row: str(row["train_elements"]),
    "optimizer": lambda row: str(row["optimizer_elements"]),
    "largest array": lambda row: row["largest_array"],
}


if __name__ == "__main__":
    main()
