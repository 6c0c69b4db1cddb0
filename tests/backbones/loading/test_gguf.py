"""GGUF files give the same model as the checkpoint that they were converted from."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from prefix_jax.backbones.loading.config import architecture, read_config
from prefix_jax.backbones.loading.gguf import GGUF
from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.errors import BackboneError
from prefix_jax.nn.rotary import Rotary

FIXTURES = Path(__file__).parents[2] / "fixtures" / "backbones"
F16, F32 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32
Q8_0 = gguf.GGMLQuantizationType.Q8_0
ARCHES = {
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}


def convert(variant: str, path: Path, kind: gguf.GGMLQuantizationType = F16) -> None:
    """Writes a model of the fixtures as llama.cpp's converter does."""
    config = read_config(FIXTURES / variant)
    arch = ARCHES[config["model_type"]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    (_write_gpt2 if arch is gguf.MODEL_ARCH.GPT2 else _write_llama)(writer, config)
    if config["eos_token_id"] < config["vocab_size"]:
        writer.add_eos_token_id(config["eos_token_id"])
    names = gguf.get_tensor_name_map(arch, 8)
    for name, x in load_file(FIXTURES / variant / "model.safetensors").items():
        for rotary, heads in (
            ("q_proj", config.get("num_attention_heads")),
            ("k_proj", config.get("num_key_value_heads")),
        ):
            if rotary in name and arch is gguf.MODEL_ARCH.LLAMA:
                x = x.reshape(heads, 2, len(x) // heads // 2, -1).swapaxes(1, 2).reshape(x.shape)
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            x = x.T
        if "gemma" in config["model_type"] and name.endswith("norm.weight"):
            x = x.astype(np.float32) + 1
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        stored = kind if x.ndim == 2 and x.shape[1] % 32 == 0 else F32
        writer.add_tensor(
            target,
            gguf.quants.quantize(np.ascontiguousarray(x, np.float32), stored),
            raw_dtype=stored,
        )
    close(writer)


def _write_gpt2(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def _write_llama(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
    rope = config["rope_parameters"]
    if "sliding_attention" in rope:
        # gguf 0.17 has no methods for this key and the next one.
        theta = rope["sliding_attention"]["rope_theta"]
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", theta)
        rope = rope["full_attention"]
    if "gemma" in config["model_type"] and "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])
        if caps := config["attn_logit_softcapping"]:
            writer.add_attn_logit_softcapping(caps)
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        else:
            kinds = config["layer_types"]
            slides = [kind == "sliding_attention" for kind in kinds]
            writer.add_array(f"{writer.arch}.attention.sliding_window_pattern", slides)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "variant",
    [
        "gpt2", "gpt2_untied", "llama_biases", "llama_linear", "llama_yarn", "smollm", "mistral",
        "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text",
    ],
)  # fmt: skip
def test_weights_and_architecture_match_the_original(variant: str, tmp_path: Path) -> None:
    convert(variant, tmp_path / "model.gguf")
    original, converted = load(FIXTURES / variant), load(tmp_path / "model.gguf")
    assert converted.fingerprint == original.fingerprint
    a, b = flatten_dict(dict(original.params)), flatten_dict(dict(converted.params))
    for path in a:
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=str(path))

    arch = original.backbone.arch
    if arch.attention_scale is not None:
        # No file contains the query scale of llama.cpp.
        arch = dataclasses.replace(arch, attention_scale=arch.head_dim**-0.5)
    expected = dataclasses.replace(
        arch,
        model_type=arch.model_type.replace("mistral", "llama"),
        epsilon=float(np.float32(arch.epsilon)),
    )
    assert converted.backbone.arch == expected


@pytest.mark.parametrize(("variant", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_largest_gemma_has_another_query_scale(variant: str, layers: int, tmp_path: Path) -> None:
    """The query scale is D / N for 27B models (144 and 168), else the head dimension."""
    config = read_config(FIXTURES / variant) | {"num_hidden_layers": layers, "layer_types": []}
    writer = gguf.GGUFWriter(
        tmp_path / "model.gguf", gguf.MODEL_ARCH_NAMES[ARCHES[config["model_type"]]]
    )
    _write_llama(writer, config)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    close(writer)
    assert architecture(read_config(tmp_path / "model.gguf"), "gguf").attention_scale == 8**-0.5


def _write_divisors(path: Path, divisors: np.ndarray) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    config = read_config(FIXTURES / "llama_grouped")
    config |= {"head_dim": 64, "rope_parameters": {"rope_type": "", "rope_theta": 500000.0}}
    _write_llama(writer, config)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    close(writer)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_recovers_rotary_scaling_of_llama_3(factor: float, tmp_path: Path) -> None:
    rotary = Rotary(500000.0, "llama3", factor, 8192, low=1.0, high=4.0)
    divisors = Rotary(500000.0).frequencies(64) / rotary.frequencies(64)
    _write_divisors(tmp_path / "model.gguf", divisors)
    assert architecture(read_config(tmp_path / "model.gguf"), "gguf").rotary == rotary


def test_rejects_unknown_rotary_scaling(tmp_path: Path) -> None:
    _write_divisors(tmp_path / "model.gguf", np.linspace(1, 9, 32))
    with pytest.raises(BackboneError, match="not a scaling of Llama 3"):
        GGUF(tmp_path / "model.gguf").config()


def _dequantised_kinds() -> list[gguf.GGMLQuantizationType]:
    kinds = []
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        with contextlib.suppress(NotImplementedError):
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
            kinds.append(kind)
    return kinds


@pytest.mark.parametrize("kind", _dequantised_kinds(), ids=lambda kind: kind.name)
def test_every_tensor_type_matches_the_gguf_package(
    kind: gguf.GGMLQuantizationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    dtype = {F16: np.float16, F32: np.float32}.get(kind, np.uint8)
    stored = np.random.default_rng(0).integers(0, 255, (70, 8 * size), np.uint8).view(dtype)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("x", stored, raw_dtype=kind)
    close(writer)
    monkeypatch.setattr("prefix_jax.backbones.loading.gguf._CHUNK", 16 * 8 * block)
    with np.errstate(all="ignore"):
        read = GGUF(tmp_path / "model.gguf").read("x").astype(np.float32)
        assert read.shape == (70, 8 * block)
        np.testing.assert_array_equal(read, gguf.dequantize(stored, kind))


def test_quantised_gguf_loads_with_another_fingerprint(tmp_path: Path) -> None:
    convert("smollm", tmp_path / "model.gguf", Q8_0)
    original, quantised = load(FIXTURES / "smollm"), load(tmp_path / "model.gguf")
    assert quantised.fingerprint != original.fingerprint
    a = original.params["layers"]["attn"]["q_DNH"]
    b = quantised.params["layers"]["attn"]["q_DNH"]
    np.testing.assert_allclose(a, b, atol=0.01)


def test_names_tensor_types_without_dequantisation(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.x", np.zeros((2, 4), np.int32))
    close(writer)
    with pytest.raises(BackboneError, match=r"blk\.0\.x is stored as I32"):
        GGUF(tmp_path / "model.gguf").read("blk.0.x")


def test_unsupported_architecture_lists_the_supported_ones(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    close(writer)
    with pytest.raises(BackboneError, match="'mamba'; supported: gpt2, llama"):
        load(tmp_path / "model.gguf")


def test_names_a_missing_metadata_key(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    close(writer)
    with pytest.raises(
        BackboneError, match=r"the metadata key llama\.attention\.head_count is missing"
    ):
        load(tmp_path / "model.gguf")


@pytest.mark.parametrize("keep", [0, 3, 40, 400, -200])
def test_names_a_truncated_file(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "model.gguf"
    convert("smollm", file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BackboneError, match=r"model\.gguf is not a complete GGUF file"):
        load(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 2**31),
        ("llama.block_count", 2**31 - 1),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", [4, 4]),
        ("llama.attention.head_count_kv", "2"),
        ("llama.embedding_length", -32),
        ("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("llama.rope.freq_base", 0.0),
        ("llama.context_length", True),
    ],
)
def test_names_metadata_of_a_wrong_type_or_range(key: str, value: Any, tmp_path: Path) -> None:
    file = tiny.write_gguf(
        tmp_path / "model.gguf", lambda name, usual: value if name == key else usual
    )
    words = {"llama.block_count": "num_hidden_layers must be an integer in \\[1, 10000\\]"}
    with pytest.raises(BackboneError, match=rf"{key} must be|{words.get(key, key)}"):
        load(file)
