"""Tests the inspection of stored prefixes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.errors import BackboneError, ConfigError, PrefixError
from prefix_jax.interop.inspect import Norms, inspect, nearest_words, norms
from prefix_jax.prefix import (
    Adapter,
    Embeds,
    Gated,
    Hidden,
    KVPrefix,
    Memory,
    Prefix,
    Produced,
    Site,
)

Forms = dict[str, Produced]
# The small models have no tokenizer.
WORDS = SimpleNamespace(decode=lambda ids: f"word{ids[0]}")


@pytest.fixture
def spelling(pretrained: Pretrained) -> Pretrained:
    """The backbone, with a tokenizer whose words are numbered."""
    model = dataclasses.replace(pretrained)
    model.tokenizer = WORDS  # a cached property: set before it is asked for
    return model


def test_sizes_and_card(forms: Forms, save) -> None:
    path = save(forms["kv"])
    report = inspect(path)
    assert report.parameters == 2 * 2 * 6 * 2 * 8
    assert report.bytes == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert (report.path, report.card.steps) == (path, 12)


def test_norms_of_keys_and_values_are_per_layer_over_slots_and_heads() -> None:
    k_LPKH = jnp.zeros((2, 3, 2, 4)).at[1].set(2.0).at[1, 0, 0].set(jnp.array([3.0, 4.0, 0, 0]))
    measured = norms(Prefix(Site(KVPrefix(k_LPKH, k_LPKH + 1)), text_position=3))
    assert measured[0] == Norms("keys", 0, 0.0, 0.0, 0.0)
    assert measured[1] == Norms("keys", 1, 4.0, pytest.approx(25 / 6), 5.0)
    assert measured[2] == Norms("values", 0, 2.0, 2.0, 2.0)
    assert [entry.of for entry in measured] == ["keys", "keys", "values", "values"]


def test_norms_of_hidden_states_and_of_soft_tokens() -> None:
    rows = jnp.array([[3.0, 4.0], [0.0, 1.0]])
    assert norms(Hidden(rows[None])) == (Norms("hidden states", 0, 1.0, 3.0, 5.0),)
    assert norms(Embeds(rows)) == (Norms("soft tokens", None, 1.0, 3.0, 5.0),)


def test_norms_of_parts_outside_the_softmax() -> None:
    adapter = Adapter(jnp.array([[[3.0, 4.0]]]), jnp.array([[-0.5, 0.25]]), layers=(7,))
    states, gates = norms(adapter)
    assert states == Norms("adapter states", 7, 5.0, 5.0, 5.0)
    assert gates == Norms("gates", 7, 0.25, 0.375, 0.5)
    k_LPKH = jnp.full((1, 2, 1, 4), 0.5)
    gated = Prefix(Site(outside=Gated(k_LPKH, 2 * k_LPKH, adapter.gate_LN)))
    assert [(entry.of, entry.max) for entry in norms(gated)] == [
        ("keys", 1.0), ("values", 2.0), ("gates", 0.5)
    ]  # fmt: skip
    memory = Prefix(Site(outside=Memory(jnp.full((1, 2, 4, 4), 1.5)), layers=(3,)))
    assert norms(memory) == (Norms("memory", 3, 3.0, 3.0, 3.0),)


def test_nearest_words_have_the_largest_cosine(spelling: Pretrained) -> None:
    table_VD = np.zeros((5, 3), np.float32)  # word 0 is a row that fills up the table
    table_VD[1:] = [[1, 0, 0], [0, 9, 0], [0, 1, 1], [-1, 0, 0]]
    params = {**spelling.params, "embed": {"tokens_VD": jnp.asarray(table_VD)}}
    model = dataclasses.replace(spelling, params=params)
    model.tokenizer = WORDS

    first, second = nearest_words(Embeds(jnp.array([[0.0, 0.3, 0.1], [-5.0, 0.1, 0.0]])), model, 3)
    assert [(word.text, word.id) for word in first[:2]] == [("word2", 2), ("word3", 3)]
    assert first[0].cosine == pytest.approx(0.3 / np.sqrt(0.1), abs=1e-6)
    assert first[1].cosine == pytest.approx(0.4 / np.sqrt(0.2), abs=1e-6)
    assert first[2].cosine == 0.0
    assert second[0].text == "word4"
    assert len(nearest_words(Embeds(jnp.ones((1, 3))), model, 99)[0]) == 5


def test_soft_tokens_that_start_as_words_are_nearest_to_them(
    forms: Forms, save, spelling: Pretrained
) -> None:
    report = inspect(save(forms["embeds"]), spelling, words=2)
    assert report.nearest is not None
    assert [words[0].text for words in report.nearest] == [f"word{i}" for i in range(3, 9)]
    assert all(words[0].cosine == pytest.approx(1.0, abs=1e-5) for words in report.nearest)
    assert report.note is None


@pytest.mark.parametrize(("kind", "name"), [("kv", "keys and values"), ("hidden", "hidden states")])
def test_only_soft_tokens_have_nearest_words(kind: str, name: str, forms: Forms, save) -> None:
    report = inspect(save(forms[kind], source="/gone"))
    assert report.nearest is None
    assert report.note == f"nearest words: not applicable; {name} are not token embeddings"


def test_moved_backbone_omits_only_the_nearest_words(forms: Forms, save) -> None:
    report = inspect(save(forms["embeds"], source="/gone/model"))
    assert report.nearest is None
    assert report.note is not None
    assert "cannot load the prefix's backbone /gone/model" in report.note
    assert "--model" in report.note
    assert report.norms


def test_named_backbone_must_exist_and_fit(forms: Forms, save, pretrained: Pretrained) -> None:
    path = save(forms["embeds"])
    with pytest.raises(BackboneError, match="/gone/model"):
        inspect(path, "/gone/model")
    with pytest.raises(PrefixError, match="weights other"):
        inspect(path, dataclasses.replace(pretrained, fingerprint="other"))


def test_zero_words_do_not_need_the_backbone(forms: Forms, save) -> None:
    report = inspect(save(forms["embeds"], source="/gone"), words=0)
    assert (report.nearest, report.note) == (None, None)
    with pytest.raises(ConfigError, match="words must be at least 0, got -1"):
        inspect(save(forms["embeds"]), words=-1)


def test_accepts_a_run_directory(forms: Forms, save, tmp_path: Path) -> None:
    shutil.copytree(save(forms["kv"]), tmp_path / "run" / "prefix")
    assert inspect(tmp_path / "run").path == tmp_path / "run" / "prefix"
