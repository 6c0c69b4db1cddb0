"""Rotary keys mean the same as in transformers, at every place in a configuration.

`tests/parity/test_live_configs.py` compares the logits.
"""

from __future__ import annotations

from typing import Any

import pytest

from prefix_jax.backbones.families.rope import read_rotary, read_rotary_of_layers
from prefix_jax.backbones.loading.config import architecture
from prefix_jax.errors import BackboneError
from prefix_jax.nn.rotary import Rotary

YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
THETAS = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}


@pytest.mark.parametrize("scaling", [YARN, LLAMA3], ids=["yarn", "llama3"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_top_level_original_length_wins(scaling: dict[str, Any], key: str) -> None:
    longest = {"max_position_embeddings": 64}
    inside = read_rotary(longest | {key: scaling | {"original_max_position_embeddings": 16}})
    assert inside.original_length == 16
    beside = longest | {"original_max_position_embeddings": 16}
    assert read_rotary(beside | {key: scaling}) == inside
    other = scaling | {"original_max_position_embeddings": 32}
    assert read_rotary(beside | {key: other}) == inside
    assert read_rotary(longest | {key: scaling}).original_length == 64


def test_rope_scaling_replaces_rope_parameters() -> None:
    config = {
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "max_position_embeddings": 64,
    }
    assert read_rotary(config) == Rotary(10_000.0, "linear", 4.0)
    assert read_rotary(config | {"rope_theta": 100.0}) == Rotary(100.0, "linear", 4.0)
    for empty in (None, {}):
        assert read_rotary(config | {"rope_scaling": empty}) == Rotary(500.0, "linear", 2.0)


def test_theta_of_rope_parameters_wins_over_the_top_level() -> None:
    assert read_rotary({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 7.0}) == Rotary(5.0)


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_whole_head_rotation_ignores_a_partial_factor_without_scaling(place: str) -> None:
    rope: dict[str, Any] = {"rope_theta": 100.0}
    config: dict[str, Any] = {"rope_parameters": rope, "max_position_embeddings": 64}
    (rope if place == "inside" else config)["partial_rotary_factor"] = 0.5
    assert read_rotary(config) == Rotary(100.0)
    rope |= YARN
    with pytest.raises(BackboneError, match=r"partial_rotary_factor is 0\.5 with rope scaling"):
        read_rotary(config)


def test_rejects_rope_parameters_per_layer_kind() -> None:
    with pytest.raises(BackboneError, match=r"by kind of layer \(full_attention\)"):
        read_rotary({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}})


def test_neox_reads_its_own_keys() -> None:
    neox = {"theta_key": "rotary_emb_base", "share_key": "rotary_pct", "share": 0.25}
    assert read_rotary({"rope_theta": 7.0}, **neox) == Rotary(10_000.0, share=0.25)
    older = {"rotary_emb_base": 100.0, "rotary_pct": 0.5}
    assert read_rotary(older, **neox) == Rotary(100.0, share=0.5)
    newer = {"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 1.0}}
    assert read_rotary(older | newer, **neox) == Rotary(9.0)
    with pytest.raises(BackboneError, match=r"partial_rotary_factor is 0\.3, but .* gives 1\.0"):
        read_rotary(newer | {"partial_rotary_factor": 0.3}, **neox)


def test_gemma_3_adds_rope_scaling_to_full_attention() -> None:
    config = {
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_parameters": {"full_attention": {"rope_theta": 500.0}},
        "rope_local_base_freq": 20.0,
        "max_position_embeddings": 64,
    }
    assert read_rotary_of_layers(config, THETAS) == {
        "full_attention": Rotary(500.0, "linear", 8.0),
        "sliding_attention": Rotary(20.0),
    }
    with pytest.raises(BackboneError, match="rope_scaling has type 'linear' but no rope_type"):
        read_rotary_of_layers(config | {"rope_scaling": {"type": "linear", "factor": 8.0}}, THETAS)
    nested = {"sliding_attention": {"rope_theta": 5.0}}
    with pytest.raises(BackboneError, match="rope_parameters without full_attention"):
        read_rotary_of_layers(config | {"rope_parameters": nested}, THETAS)


def test_gemma_3_reads_the_original_length_only_in_rope_parameters() -> None:
    config = {
        "rope_parameters": {"full_attention": YARN},
        "original_max_position_embeddings": 16,
        "max_position_embeddings": 64,
    }
    assert read_rotary_of_layers(config, THETAS)["full_attention"].original_length == 64


def test_rejects_unsupported_layer_kinds() -> None:
    config = {
        "model_type": "gemma2",
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "chunked_attention"],
    }
    with pytest.raises(BackboneError, match="layer_types has 'chunked_attention'; supported: "):
        architecture(config, "here")
    with pytest.raises(BackboneError, match="one kind for each of 3 layers"):
        architecture(config | {"num_hidden_layers": 3}, "here")
