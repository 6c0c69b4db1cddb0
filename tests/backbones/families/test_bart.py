"""Configurations and checkpoints of BART."""

from __future__ import annotations

import json

import pytest
import safetensors.numpy
import tiny

from prefix_jax.backbones.loading.config import architecture, read_config
from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.errors import BackboneError

CONFIG = tiny.BART_CONFIG


def test_position_table_limits_source_and_target_separately():
    arch = architecture(CONFIG, "bart")
    assert arch.max_positions == arch.encoder.max_positions == 256
    assert arch.positions == arch.encoder.positions == 258


def test_embeddings_are_scaled_on_request():
    assert architecture(CONFIG, "bart").embed_scale is None
    assert architecture(CONFIG | {"scale_embedding": True}, "bart").embed_scale == 32**0.5


def test_bare_checkpoint_has_no_head_bias(tmp_path):
    path = tiny.write_bart(tmp_path / "bart")
    assert load(path).backbone.arch.head_bias
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    tensors.pop("final_logits_bias")
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    assert not load(path).backbone.arch.head_bias


def test_names_may_have_a_prefix_and_shared_embeddings_any_name(tmp_path):
    path = tiny.write_bart(tmp_path / "bart")
    usual = load(path).fingerprint
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    bias, table = tensors.pop("final_logits_bias"), tensors.pop("shared.weight")
    for name in ("model.decoder.embed_tokens.weight", "lm_head.weight"):
        stored = {f"model.{name}": x for name, x in tensors.items()}
        stored |= {"final_logits_bias": bias, name: table}
        safetensors.numpy.save_file(stored, path / "model.safetensors")
        assert load(path).fingerprint == usual


def test_reads_start_and_forced_tokens_from_generation_config(tmp_path):
    path = tiny.write_bart(tmp_path / "bart")
    arch = architecture(read_config(path), "bart")
    assert (arch.start_id, arch.first_id, arch.last_id) == (256, 258, 256)
    frame = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
    bare = {key: value for key, value in CONFIG.items() if key not in frame}
    (path / "config.json").write_text(json.dumps(bare))
    arch = architecture(read_config(path), "bart")
    # transformers starts with the default of its configuration, but forces no token by default.
    assert (arch.start_id, arch.first_id, arch.last_id) == (2, None, None)
    generation = {key: CONFIG[key] for key in frame} | {"min_length": 56}
    (path / "generation_config.json").write_text(json.dumps(generation))
    assert read_config(path) == CONFIG
    (path / "generation_config.json").write_text("[")
    with pytest.raises(BackboneError, match=r"generation_config\.json: malformed JSON"):
        read_config(path)


@pytest.mark.parametrize(
    ("of_its_own", "in_config", "last"),
    [(None, None, None), (None, 9, 9), (None, 2, 2), ({}, 9, None), ({}, None, None)]
    + [({"forced_eos_token_id": 7}, config, 7) for config in (None, 9)],
)
def test_only_generation_config_decides_the_forced_end(of_its_own, in_config, last, tmp_path):
    """`tests/parity` compares these with transformers."""
    path = tiny.write_bart(tmp_path / "bart", forced_eos_token_id=in_config)
    if of_its_own is not None:
        start = {"decoder_start_token_id": 256}
        (path / "generation_config.json").write_text(json.dumps(start | of_its_own))
    assert architecture(read_config(path), "bart").last_id == last


def test_rejects_several_forced_tokens():
    with pytest.raises(BackboneError, match=r"forced_eos_token_id is \[1, 2\]; only a single"):
        architecture(CONFIG | {"forced_eos_token_id": [1, 2]}, "bart")
