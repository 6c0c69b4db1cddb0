"""Token tables that a checkpoint stores several times or under alternative names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.loading import ties
from prefix_jax.backbones.loading.pretrained import architecture_of, load
from prefix_jax.errors import BackboneError
from prefix_jax.nn.attention.mask import TokenLayout

FIXTURES = Path(__file__).parents[2] / "fixtures" / "backbones"
# The embedding and the head of a tied decoder of every family.
DECODERS = {
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "smollm": ("model.embed_tokens.weight", "lm_head.weight"),
    "gemma2": ("model.embed_tokens.weight", "lm_head.weight"),
    "gemma3": ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    "opt": ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    "neox_serial": ("gpt_neox.embed_in.weight", "embed_out.weight"),
}
_WRITERS: dict[str, Any] = {"t5": tiny.write_t5, "bart": tiny.write_bart}


def _write(directory: Path, variant: str, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    directory.mkdir()
    content = json.loads((FIXTURES / variant / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(content))
    save_file(tensors, directory / "model.safetensors")
    return directory


def _logits(path: Path) -> np.ndarray:
    """Logits of a decoder, or of an encoder-decoder with equal inputs in both stacks."""
    model = load(path, dtype="float32")
    ids = jnp.arange(5, 29).reshape(2, 12)
    tokens = TokenLayout.plain(jnp.ones(ids.shape, bool))
    backbone: Backbone = model.backbone
    encoded = None
    if backbone.arch.encoder is not None:
        encoded = backbone.encode(model.params, ids, tokens)
    h_BTD, _ = backbone.hidden(model.params, ids, tokens, encoded=encoded)
    return np.asarray(backbone.unembed(model.params, h_BTD))


def _other(table: np.ndarray, seed: int = 1) -> np.ndarray:
    return (0.2 * np.random.default_rng(seed).normal(size=table.shape)).astype(table.dtype)


@pytest.mark.parametrize("variant", DECODERS)
def test_stored_head_that_differs_from_a_tied_table_is_used(variant: str, tmp_path: Path) -> None:
    table, head = DECODERS[variant]
    tensors = load_file(FIXTURES / variant / "model.safetensors")
    tensors[head] = _other(tensors[table])
    path = _write(tmp_path / "unequal", variant, tensors, tie_word_embeddings=True)
    untied = _write(tmp_path / "untied", variant, tensors, tie_word_embeddings=False)
    assert not architecture_of(path).tied
    np.testing.assert_array_equal(_logits(path), _logits(untied))
    del tensors[head]
    tied = _write(tmp_path / "tied", variant, tensors, tie_word_embeddings=True)
    assert np.abs(_logits(path) - _logits(tied)).max() > 0.1


@pytest.mark.parametrize("variant", DECODERS)
def test_table_stored_twice_or_only_as_the_head_is_tied(variant: str, tmp_path: Path) -> None:
    table, head = DECODERS[variant]
    tensors = load_file(FIXTURES / variant / "model.safetensors")
    usual = load(_write(tmp_path / "once", variant, tensors, tie_word_embeddings=True))
    tensors[head] = tensors[table]
    twice = load(_write(tmp_path / "twice", variant, tensors, tie_word_embeddings=True))
    del tensors[table]
    as_head = load(_write(tmp_path / "head", variant, tensors, tie_word_embeddings=True))
    assert usual.backbone.arch.tied
    assert twice.backbone == as_head.backbone == usual.backbone
    assert twice.fingerprint == as_head.fingerprint == usual.fingerprint


def test_rejects_an_untied_decoder_without_its_head(tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "smollm" / "model.safetensors")
    path = _write(tmp_path / "model", "smollm", tensors, tie_word_embeddings=False)
    with pytest.raises(BackboneError, match=r"1 missing:\n    lm_head\.weight"):
        load(path)


def test_tables_of_two_dtypes_are_compared_by_value(tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "smollm" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].astype(np.float32)
    path = _write(tmp_path / "equal", "smollm", tensors)
    assert architecture_of(path).tied
    tensors["lm_head.weight"][-1, -1] += 1e-6
    assert not architecture_of(_write(tmp_path / "unequal", "smollm", tensors)).tied


def test_tables_are_compared_to_the_last_value_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ties, "_CHUNK", 7)
    tensors = load_file(FIXTURES / "smollm" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    assert architecture_of(_write(tmp_path / "equal", "smollm", tensors)).tied
    tensors["lm_head.weight"][-1, -1] += 1
    assert not architecture_of(_write(tmp_path / "unequal", "smollm", tensors)).tied


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", _WRITERS)
def test_stored_tables_of_encoder_and_decoder_are_used(
    family: str, tied: bool, tmp_path: Path
) -> None:
    path = _WRITERS[family](tmp_path / family, tie_word_embeddings=tied)
    file = path / "model.safetensors"
    tensors = load_file(file)
    shared = tensors["shared.weight"]
    tensors["lm_head.weight"] = head = tensors.get("lm_head.weight", _other(shared, 9))
    tables = {"encoder": _other(shared, 1), "decoder": _other(shared, 2)}
    for stack, table in tables.items():
        tensors[f"{stack}.embed_tokens.weight"] = table
    save_file(tensors, file)
    model = load(path, dtype="float32")
    params = model.params
    assert model.backbone.arch.encoder.own_tokens
    assert not model.backbone.arch.tied
    np.testing.assert_array_equal(params["encoder"]["embed"]["tokens_VD"], tables["encoder"])
    np.testing.assert_array_equal(params["embed"]["tokens_VD"], tables["decoder"])
    np.testing.assert_array_equal(params["head"]["unembed_DV"], head.T)
    assert model.backbone.input_table(params) is params["encoder"]["embed"]["tokens_VD"]
    # Each stack uses its own table.
    usual = _logits(path)
    for stack in tables:
        save_file(tensors | {f"{stack}.embed_tokens.weight": shared}, file)
        assert np.abs(_logits(path) - usual).max() > 1e-3


@pytest.mark.parametrize("family", _WRITERS)
def test_head_stays_tied_to_the_shared_table_if_the_decoder_has_another(
    family: str, tmp_path: Path
) -> None:
    path = _WRITERS[family](tmp_path / family, tie_word_embeddings=True)
    file = path / "model.safetensors"
    tensors = load_file(file)
    shared = tensors["shared.weight"]
    tensors["decoder.embed_tokens.weight"] = _other(shared)
    save_file(tensors, file)
    model = load(path, dtype="float32")
    params = model.params
    np.testing.assert_array_equal(params["encoder"]["embed"]["tokens_VD"], shared)
    np.testing.assert_array_equal(params["head"]["unembed_DV"], shared.T)
    np.testing.assert_array_equal(
        params["embed"]["tokens_VD"], tensors["decoder.embed_tokens.weight"]
    )


def test_rejects_two_spellings_of_one_tensor(tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "smollm" / "model.safetensors")
    tensors["norm.weight"] = tensors["model.norm.weight"] + 1
    with pytest.raises(BackboneError, match=r"model\.norm\.weight.*two spellings"):
        load(_write(tmp_path / "model", "smollm", tensors))
