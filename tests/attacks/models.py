"""Attacks on the files of models: configs, tokenizers and weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import tiny
from mutations import (
    dump_json,
    mutate_bytes,
    mutate_json,
)
from safetensors.numpy import load_file

from attacks.registry import FIXTURES, Attempt, replaced, target
from prefix_jax.backbones.loading.pretrained import architecture_of, load
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.untrusted.tokenizer import token_ids


def _read_model(path: Path) -> None:
    """Loads a model, traces a forward pass and tokenises a text."""
    pretrained = load(path)
    backbone, params = pretrained.backbone, pretrained.stacked()
    ids_BT = jnp.zeros((1, 8), jnp.int32)
    tokens = TokenLayout.plain(ids_BT == 0)

    def logits(params: Any) -> jax.Array:
        encoded = None
        if backbone.arch.encoder is not None:
            encoded = backbone.encode(params, ids_BT, tokens)
        h_BTD, _ = backbone.hidden(params, ids_BT, tokens, encoded=encoded)
        return backbone.unembed(params, h_BTD) if backbone.arch.causal else h_BTD

    jax.eval_shape(logits, params)
    token_ids(pretrained.tokenizer, ["ab, 12"], "a text", add_special_tokens=True)


def _models(folder: Path) -> list[Path]:
    """Tiny models of several families, with their tokenizers."""
    models = [
        tiny.write_model(folder / "llama"),
        tiny.write_encoder(folder / "bert", "bert"),
        tiny.write_encoder(folder / "roberta", "roberta"),
        tiny.write_t5(folder / "t5"),
        tiny.write_bart(folder / "bart"),
    ]
    for name in ("gemma2", "gemma3", "gpt2", "neox", "opt", "qwen3", "llama_yarn", "mistral"):
        copy = Path(shutil.copytree(FIXTURES / "backbones" / name, folder / name))
        tiny.write_ascii_tokenizer(copy)
        models.append(copy)
    for model in models:
        generation = {"eos_token_id": [1, 2], "bos_token_id": 1, "max_length": 20}
        (model / "generation_config.json").write_text(json.dumps(generation))
    return models


def _json_of_models(folder: Path, name: str) -> Attempt:
    models = _models(folder)

    def attempt(rng: Random) -> None:
        file = rng.choice(models) / name
        original = file.read_bytes()
        if rng.random() < 0.15:
            content = mutate_bytes(original, rng)
        else:
            content = dump_json(mutate_json(json.loads(original), rng))
        with replaced(file, content):
            _read_model(file.parent)

    return attempt


@target
def _config_json(folder: Path) -> Attempt:
    return _json_of_models(folder, "config.json")


@target
def _config_json_alone(folder: Path) -> Attempt:
    models = _models(folder)
    for model in models:
        (model / "model.safetensors").unlink()

    def attempt(rng: Random) -> None:
        file = rng.choice(models) / "config.json"
        content = dump_json(mutate_json(json.loads(file.read_bytes()), rng))
        with replaced(file, content):
            architecture_of(file.parent)

    return attempt


@target
def _generation_config_json(folder: Path) -> Attempt:
    return _json_of_models(folder, "generation_config.json")


@target
def _tokenizer_json(folder: Path) -> Attempt:
    return _json_of_models(folder, "tokenizer.json")


@target
def _tokenizer_config_json(folder: Path) -> Attempt:
    return _json_of_models(folder, "tokenizer_config.json")


@target
def _safetensors(folder: Path) -> Attempt:
    file = tiny.write_model(folder / "model") / "model.safetensors"
    original = file.read_bytes()
    length = int.from_bytes(original[:8], "little")
    header, data = json.loads(original[8 : 8 + length]), original[8 + length :]

    def attempt(rng: Random) -> None:
        if rng.random() < 0.5:
            content = mutate_bytes(original, rng, span=8 + length)
        else:
            text = dump_json(mutate_json(header, rng))
            content = len(text).to_bytes(8, "little") + text + data
        with replaced(file, content):
            _read_model(file.parent)

    return attempt


@target
def _safetensors_index(folder: Path) -> Attempt:
    model = tiny.write_model(folder / "model")
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    tensors = load_file(model / "model-00001-of-00001.safetensors")
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors"),
    }

    def attempt(rng: Random) -> None:
        content = dump_json(mutate_json(index, rng))
        (model / "model.safetensors.index.json").write_bytes(content)
        _read_model(model)

    return attempt


@target
def _gguf(folder: Path) -> Attempt:
    file = tiny.write_gguf(folder / "model.gguf")
    original = file.read_bytes()
    header = original.index(b"token_embd.weight") + 2000

    def attempt(rng: Random) -> None:
        # A new name each time, because an open file may be cached.
        mutated = folder / f"model-{rng.randrange(2**60)}.gguf"
        mutated.write_bytes(mutate_bytes(original, rng, span=rng.choice((400, header))))
        try:
            _read_model(mutated)
        finally:
            mutated.unlink()

    return attempt


@target
def _gguf_metadata(folder: Path) -> Attempt:
    def attempt(rng: Random) -> None:
        mutated = folder / f"model-{rng.randrange(2**60)}.gguf"
        tiny.write_gguf(mutated, lambda name, value: _mutated_metadata(value, rng))
        try:
            _read_model(mutated)
        finally:
            mutated.unlink()

    return attempt


def _mutated_metadata(value: Any, rng: Random) -> Any:
    """Returns a GGUF metadata value, sometimes replaced by another that the format supports."""
    if rng.random() > 0.08:
        return value
    if isinstance(value, list) and rng.random() < 0.7:
        cut = rng.randrange(len(value))
        return value[:cut] or value[:1]
    return rng.choice((0, 1, 2, -1, 7, 2**31 - 1, "x", "gpt2", 0.0, float("nan"), True, [1], ["x"]))
