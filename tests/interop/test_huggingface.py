"""A GGUF backbone keeps its weights, tokenizer and end tokens in Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.errors import BackboneError
from prefix_jax.interop import huggingface
from prefix_jax.interop.huggingface import write_huggingface


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf")


def test_copy_is_the_same_model(model: Path, tmp_path: Path) -> None:
    write_huggingface(model, tmp_path / "copy")
    original, copy = load(model), load(tmp_path / "copy")
    assert copy.fingerprint == original.fingerprint
    assert copy.backbone.arch == original.backbone.arch
    text = "abba {}\n<|end|> é"
    assert copy.tokenizer(text).input_ids == original.tokenizer(text).input_ids
    assert copy.tokenizer.chat_template == original.tokenizer.chat_template


def test_large_models_have_several_files_and_an_index(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "_SHARD", 10_000)
    write_huggingface(model, tmp_path / "copy")
    files = sorted(file.name for file in (tmp_path / "copy").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert load(tmp_path / "copy").fingerprint == load(model).fingerprint


def test_weights_are_written_in_the_given_dtype(model: Path, tmp_path: Path) -> None:
    write_huggingface(model, tmp_path / "copy", "bfloat16")
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["dtype"] == "bfloat16"
    half = load(model, dtype="bfloat16")
    assert load(tmp_path / "copy", dtype="bfloat16").fingerprint == half.fingerprint


def test_directories_and_occupied_outputs_are_refused(
    model: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(BackboneError, match="is a directory already; give a GGUF file"):
        write_huggingface(tiny_model_dir, tmp_path / "copy")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "notes.txt").write_text("mine")
    with pytest.raises(BackboneError, match="not an empty directory; choose another one"):
        write_huggingface(model, tmp_path / "occupied")
    assert [file.name for file in (tmp_path / "occupied").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("transposed", [True, False])
def test_fused_matrices_are_the_inverse_of_reading_them(inputs: int, transposed: bool) -> None:
    rows = [
        huggingface.Row("w", str(part), huggingface.Matrix(inputs, transposed, part, 3))
        for part in range(3)
    ]
    parts = [np.random.default_rng(part).normal(size=(4, 2, 3)) for part in range(3)]
    stored = huggingface._fuse(rows, parts)
    for row, part in zip(rows, parts, strict=True):
        assert stored.shape == row.storage.stored(part.shape)
        np.testing.assert_array_equal(row.storage(stored, part.shape), part)
