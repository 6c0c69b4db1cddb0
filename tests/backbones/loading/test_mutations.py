"""Mutated model files either load and trace, or raise one BackboneError that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.loading.pretrained import architecture_of, load
from prefix_jax.backbones.loading.quantized import abstract_params
from prefix_jax.backbones.stacking import Params
from prefix_jax.errors import BackboneError
from prefix_jax.nn.attention.mask import TokenLayout
from tests.mutations import dump_json, mutate_bytes, mutate_json, refusal

FIXTURES = Path(__file__).parents[2] / "fixtures"
CONFIGS = [
    "backbones/gemma3", "backbones/llama_yarn", "backbones/neox", "backbones/qwen2_window",
    "encoder_decoders/bart", "encoder_decoders/t5_gated", "encoders/electra", "encoders/roberta",
]  # fmt: skip
GENERATION = {"eos_token_id": [1, 2], "bos_token_id": 1, "forced_eos_token_id": 2}


def logits(arch: Architecture, params: Params) -> jax.Array:
    """The output for a short text."""
    backbone, ids_BT = Backbone(arch), jnp.zeros((1, 8), jnp.int32)
    tokens = TokenLayout.plain(ids_BT == 0)
    encoded = None if arch.encoder is None else backbone.encode(params, ids_BT, tokens)
    h_BTD, _ = backbone.hidden(params, ids_BT, tokens, encoded=encoded)
    return backbone.unembed(params, h_BTD) if arch.causal else h_BTD


def trace(path: Path) -> None:
    """Reads a configuration and traces its forward pass, without weights."""
    arch = architecture_of(path)
    params = abstract_params(Backbone(arch), "float32", "none")
    jax.eval_shape(lambda params: logits(arch, params), params)


def run(path: Path) -> None:
    """Loads a model and computes a forward pass."""
    pretrained = load(path)
    out = logits(pretrained.backbone.arch, pretrained.stacked())
    assert np.isfinite(out).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_mutated_configs_trace_or_are_refused(name: str, tmp_path: Path) -> None:
    config = json.loads((FIXTURES / name / "config.json").read_text())
    rng, refused = Random(name), 0
    for _ in range(12):
        (tmp_path / "config.json").write_bytes(dump_json(mutate_json(config, rng)))
        message = refusal(lambda: trace(tmp_path), BackboneError)
        refused += message is not None
    assert 0 < refused < 12


def test_mutated_generation_configs_are_read_or_refused(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "encoder_decoders" / "bart" / "config.json", tmp_path)
    rng, refused = Random(0), 0
    for _ in range(200):
        (tmp_path / "generation_config.json").write_bytes(dump_json(mutate_json(GENERATION, rng)))
        message = refusal(lambda: architecture_of(tmp_path), BackboneError)
        refused += message is not None
    assert 50 < refused < 200


def test_mutated_checkpoints_run_or_are_refused(tmp_path: Path) -> None:
    """Config, index and header together, down to the numbers of a forward pass."""
    model = tiny.write_model(tmp_path / "model")
    shard = (model / "model.safetensors").rename(model / "model-1-of-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(shard), shard.name)}
    files: dict[str, Any] = {"config.json": json.loads((model / "config.json").read_text())}
    files["model.safetensors.index.json"] = index
    weights = shard.read_bytes()
    rng, refused = Random(0), 0
    for _ in range(25):
        for name, content in files.items():
            mutated = mutate_json(content, rng, 1) if rng.random() < 0.4 else content
            (model / name).write_bytes(dump_json(mutated))
        shard.write_bytes(mutate_bytes(weights, rng) if rng.random() < 0.3 else weights)
        refused += refusal(lambda: run(model), BackboneError) is not None
    assert 10 < refused < 25


@pytest.mark.parametrize("part", ["bytes", "metadata"])
def test_mutated_gguf_files_run_or_are_refused(part: str, tmp_path: Path) -> None:
    original = tiny.write_gguf(tmp_path / "original.gguf").read_bytes()
    rng, refused = Random(0), 0

    def edit(name: str, value: Any) -> Any:
        return rng.choice((0, -1, 2**31, "x", 0.0, True, [1])) if rng.random() < 0.05 else value

    for attempt in range(20):
        file = tmp_path / f"{attempt}.gguf"
        if part == "bytes":
            file.write_bytes(mutate_bytes(original, rng))
        else:
            tiny.write_gguf(file, edit)
        message = refusal(lambda file=file: run(file), BackboneError)
        assert message is None or file.name in message
        refused += message is not None
    assert 5 < refused < 20
