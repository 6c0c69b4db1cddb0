"""Configurations of T5 and mT5."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny

from prefix_jax.backbones.loading.config import architecture, read_config
from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.errors import BackboneError

CONFIG = tiny.T5_CONFIG


def test_tying_decides_scaling_before_transformers_5():
    for tied in (True, False):
        older = architecture(CONFIG | {"tie_word_embeddings": tied}, "older")
        newer = architecture(
            CONFIG | {"tie_word_embeddings": True, "scale_decoder_outputs": tied}, "newer"
        )
        assert older.head_scale == newer.head_scale == (32**-0.5 if tied else None)
    assert architecture(CONFIG | {"model_type": "mt5"}, "mt5").head_scale is None


def test_original_t5_is_tied_scaled_and_ungated():
    first = {k: v for k, v in CONFIG.items() if k not in ("feed_forward_proj",)}
    arch = architecture(first | {"tie_word_embeddings": True}, "t5-small")
    assert (arch.activation, arch.gated, arch.tied) == ("relu", False, True)
    gated = architecture(CONFIG, "flan-t5-small")
    assert (gated.activation, gated.gated, gated.tied) == ("gelu_new", True, False)


def test_stored_head_is_used_even_if_the_config_ties_it(tmp_path):
    path = tiny.write_t5(tmp_path / "t5")
    untied = load(path)
    config = CONFIG | {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    (path / "config.json").write_text(json.dumps(config))
    assert load(path).fingerprint == untied.fingerprint
    assert not load(path).backbone.arch.tied


def test_shared_embeddings_may_have_any_of_their_names(tmp_path):
    import safetensors.numpy

    path = tiny.write_t5(tmp_path / "t5", tie_word_embeddings=True)
    usual = load(path)
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    table = tensors.pop("shared.weight")
    for names in (["decoder.embed_tokens.weight"], ["encoder.embed_tokens.weight"],
                  ["shared.weight", "decoder.embed_tokens.weight"]):  # fmt: skip
        stored = tensors | dict.fromkeys(names, table)
        safetensors.numpy.save_file(stored, path / "model.safetensors")
        assert load(path).fingerprint == usual.fingerprint


def test_start_token_defaults_to_padding():
    bare = {k: v for k, v in CONFIG.items() if k != "decoder_start_token_id"}
    assert architecture(bare | {"pad_token_id": 0}, "t5").start_id == 0
    assert architecture(bare | {"decoder_start_token_id": 7}, "t5").start_id == 7


def test_stacks_may_have_different_depths():
    arch = architecture(CONFIG, "t5")
    assert (arch.encoder.layers, arch.layers) == (3, 2)
    even = architecture({k: v for k, v in CONFIG.items() if k != "num_decoder_layers"}, "t5")
    assert even.layers == even.encoder.layers == 3
    assert dataclasses.replace(even.encoder.relative, both_ways=False) == even.relative
    spelled = architecture(
        {k: v for k, v in CONFIG.items() if k != "num_decoder_layers"} | {"num_hidden_layers": 1},
        "t5",
    )
    assert (spelled.encoder.layers, spelled.layers) == (1, 3)


def test_rejects_umt5(tmp_path):
    path = tiny.write_t5(tmp_path / "umt5")
    (path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "umt5"}))
    with pytest.raises(BackboneError, match="unsupported architecture 'umt5'"):
        architecture(read_config(path), str(path))


@pytest.mark.parametrize(
    ("buckets", "distance", "fits"),
    [(32, 17, True), (32, 16, False), (32, 9, False), (2, 9, False)],
)
def test_rejects_relative_positions_without_a_logarithmic_range(
    buckets: int, distance: int, fits: bool
) -> None:
    config = CONFIG | {
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": distance,
    }
    if fits:
        assert architecture(config, "t5").relative.farthest == distance
        return
    with pytest.raises(BackboneError, match=r"relative_attention_(max_distance|num_buckets)"):
        architecture(config, "t5")


def test_stored_activation_wins_over_the_projection_name() -> None:
    arch = architecture(CONFIG | {"dense_act_fn": "relu", "is_gated_act": False}, "t5")
    assert (arch.activation, arch.gated) == ("relu", False)
