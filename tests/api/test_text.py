"""A baked text followed by a prompt equals the text in front of the prompt."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import prefix_jax as pj
from prefix_jax.backbones import text as chunks
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.backbones.starts import starts_from_text
from prefix_jax.backbones.text import text_prefix
from prefix_jax.config import DecodeConfig
from prefix_jax.decode import Generator
from prefix_jax.errors import BackboneError, ContextError, DataError
from prefix_jax.prefix import Prefix

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"
TEXT = "a long system prompt, to be read once"


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Pretrained:
    return pj.load(tiny_model_dir, dtype="float32")


def answer(model: Pretrained, prefix: Prefix | None, prompt: list[int]) -> tuple[int, ...]:
    generator = Generator(model.backbone, model.unstacked(), model.tokenizer, prefix)
    (generation,) = generator.generate([prompt], DecodeConfig(max_new_tokens=8))
    return generation.samples[0].ids


def test_prefix_equals_the_text_before_the_prompt(model: Pretrained) -> None:
    tuned = pj.bake_text(model, TEXT)
    assert tuned.prefix is not None
    text, prompt = model.tokenizer(TEXT).input_ids, [5, 6, 7]
    assert tuned.prefix.length == len(text)
    assert answer(model, tuned.prefix, prompt) == answer(model, None, text + prompt)


@pytest.mark.parametrize("name", ["llama_grouped", "gpt2", "mistral", "gemma3_text", "opt", "neox"])
@pytest.mark.parametrize("length", [3, 4, 5, 11])
def test_chunks_equal_one_pass(name: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_CHUNK", 4)
    model = pj.load(FIXTURES / name, dtype="float32")
    ids = list(range(3, 3 + length))
    params = model.stacked()
    _, _, whole = starts_from_text(model.backbone, params, jnp.asarray(ids))
    prefix = text_prefix(model.backbone, params, ids)
    assert prefix.decoder is not None
    assert whole.decoder is not None
    assert prefix.decoder.inside is not None
    assert whole.decoder.inside is not None
    assert prefix.text_position == length
    for ours, theirs in (
        (prefix.decoder.inside.k_LPKH, whole.decoder.inside.k_LPKH),
        (prefix.decoder.inside.v_LPKH, whole.decoder.inside.v_LPKH),
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_stored_text_is_a_prefix_like_any_other(model: Pretrained, tmp_path: Path) -> None:
    tuned = pj.bake_text(model, TEXT)
    tuned.save(tmp_path / "text")
    loaded = pj.load_prefix(tmp_path / "text", model)
    assert loaded.card is not None
    assert loaded.card.init == f"text: {TEXT}"
    assert loaded.generate("abc", max_new_tokens=4) == tuned.generate("abc", max_new_tokens=4)


def test_unusable_texts_and_models_are_refused(model: Pretrained, tiny_encoder_dir: Path) -> None:
    with pytest.raises(DataError, match="the text is empty"):
        pj.bake_text(model, "")
    with pytest.raises(ContextError, match="has 256 positions; shorten the text"):
        pj.bake_text(model, "x" * 300)
    with pytest.raises(BackboneError, match="use a decoder-only model"):
        pj.bake_text(pj.load(tiny_encoder_dir), TEXT)
