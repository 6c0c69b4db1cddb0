"""Configurations and checkpoints of encoders."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prefix_jax.backbones.loading.config import architecture, read_config
from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.errors import BackboneError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "encoders"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "bert", tmp_path / "model"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("position_embedding_type", "relative_key_query"),
    ],
)
def test_rejects_encoders_with_unsupported_features(field: str, value: object) -> None:
    config = read_config(FIXTURES / "bert")
    with pytest.raises(BackboneError, match=f"bert with {field}={value} is not supported"):
        architecture(config | {field: value}, "here")


def test_omitted_numbers_get_defaults() -> None:
    config = read_config(FIXTURES / "xlm_roberta")
    usual = ("pad_token_id", "is_decoder", "hidden_act", "add_cross_attention")
    older = {key: value for key, value in config.items() if key not in usual}
    assert architecture(older, "older") == architecture(config, "newer")


def test_distilbert_has_no_token_types_and_roberta_one() -> None:
    segments = {
        name: architecture(read_config(FIXTURES / name), name).token_types
        for name in ("bert", "roberta", "distilbert")
    }
    assert segments == {"bert": 2, "roberta": 1, "distilbert": 0}


def test_reads_the_first_spelling_of_norms(model: Path) -> None:
    """Google's checkpoints name a norm's scale and bias gamma and beta, after a prefix."""
    modern = load(model).fingerprint
    tensors = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): x
        for name, x in load_file(model / "model.safetensors").items()
    }
    assert "bert.embeddings.LayerNorm.gamma" in tensors
    save_file(tensors, model / "model.safetensors")
    assert load(model).fingerprint == modern


def test_ignores_heads_and_position_ids(model: Path) -> None:
    alone = load(model).fingerprint
    tensors = {f"bert.{name}": x for name, x in load_file(model / "model.safetensors").items()}
    tensors |= {
        "bert.embeddings.position_ids": np.arange(40)[None],
        "cls.predictions.transform.LayerNorm.gamma": np.ones(32, np.float32),
        "cls.seq_relationship.weight": np.ones((2, 32), np.float32),
    }
    save_file(tensors, model / "model.safetensors")
    assert load(model).fingerprint == alone


def test_reports_tensors_that_are_not_part_of_the_encoder(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["encoder.layer.0.crossattention.self.query.weight"] = np.zeros((32, 32), np.float16)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(BackboneError, match=r"1 unexpected:\n    encoder\.layer\.0\.cross"):
        load(model)


def test_pooler_exists_if_the_checkpoint_has_it(model: Path) -> None:
    assert load(model).backbone.arch.pooler
    tensors = load_file(model / "model.safetensors")
    save_file({k: x for k, x in tensors.items() if "pooler" not in k}, model / "model.safetensors")
    without = load(model)
    assert not without.backbone.arch.pooler
    assert "pooler" not in without.params


def test_rejects_half_a_pooler(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["pooler.dense.bias"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(BackboneError, match=r"1 missing:\n    pooler\.dense\.bias"):
        load(model)
