"""Stored prefixes load unchanged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from stored_prefixes import (
    BACKBONE,
    CONTAINERS,
    GEOMETRY,
    PREFIXES,
    assert_equal,
    card_of,
    edit_card,
    files,
    in_both_containers,
    keys_values,
    random,
    sign,
    with_absent_slots,
)

from prefix_jax import artifact
from prefix_jax.artifact import make_card
from prefix_jax.errors import ConfigError, PrefixError
from prefix_jax.prefix import Geometry, KVPrefix, Prefix, Site, SiteShape


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", PREFIXES)
def test_prefix_and_card_round_trip(
    name: str, container: artifact.Container, tmp_path: Path
) -> None:
    produced = PREFIXES[name]
    card = card_of(produced)
    artifact.save(tmp_path / "p", produced, card, container)
    loaded, loaded_card = artifact.load(tmp_path / "p")
    assert_equal(loaded, produced)
    assert type(loaded) is type(produced)
    assert loaded_card == card
    if isinstance(produced, Prefix):
        assert isinstance(loaded, Prefix)
        assert (loaded.text_position, loaded.pinned) == (produced.text_position, produced.pinned)


def test_saving_a_loaded_prefix_gives_the_same_bytes(tmp_path: Path) -> None:
    produced = with_absent_slots()
    artifact.save(tmp_path / "a", produced, card_of(produced), "safetensors")
    artifact.save(tmp_path / "b", *artifact.load(tmp_path / "a"), "safetensors")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_prefix_survives_conversion_between_containers(tmp_path: Path) -> None:
    produced = with_absent_slots()
    artifact.save(tmp_path / "a", produced, card_of(produced), "safetensors")
    artifact.save(tmp_path / "b", *artifact.load(tmp_path / "a"), "orbax")
    artifact.save(tmp_path / "c", *artifact.load(tmp_path / "b"), "safetensors")
    assert files(tmp_path / "a") == files(tmp_path / "c")


def test_bfloat16_is_stored_without_loss(tmp_path: Path) -> None:
    k = random(3, 5, 2, 8).astype(jnp.bfloat16)
    produced = Prefix(Site(KVPrefix(k, k)), text_position=5)
    artifact.save(tmp_path / "p", produced, card_of(produced))
    loaded, _ = artifact.load(tmp_path / "p")
    assert isinstance(loaded, Prefix)
    assert loaded.decoder.inside is not None
    assert loaded.decoder.inside.k_LPKH.dtype == jnp.float32
    assert np.array_equal(loaded.decoder.inside.k_LPKH, k.astype(jnp.float32))


@pytest.mark.parametrize("container", CONTAINERS)
def test_sixteen_slots_of_a_135m_model_need_less_than_a_megabyte(
    container: artifact.Container, tmp_path: Path
) -> None:
    k_LPKH, v_LPKH = random(2, 30, 16, 3, 64)
    produced = Prefix(Site(KVPrefix(k_LPKH, v_LPKH)), text_position=16)
    card = make_card(produced, Geometry(576, 49152, SiteShape(30, 9, 3, 64)), BACKBONE)
    artifact.save(tmp_path / "p", produced, card, container)
    array_bytes = 2 * 30 * 16 * 3 * 64 * 4
    assert sum(map(len, files(tmp_path / "p").values())) < array_bytes + 8_000


def test_card_is_readable_text_with_one_field_per_line(stored: Path) -> None:
    lines = (stored / "prefix.json").read_text().splitlines()
    assert lines[1] == '  "format_version": 4,'
    assert '  "positions": [0, 1, 2, 3, 4],' in lines
    assert '  "init": "text: the café",' in lines


def test_card_may_be_reformatted(stored: Path) -> None:
    card = artifact.load(stored)[1]
    fields = json.loads((stored / "prefix.json").read_text())
    (stored / "prefix.json").write_text(json.dumps(fields, indent=4, sort_keys=True))
    assert artifact.load(stored)[1] == card


def test_non_finite_metric_is_stored_as_null(tmp_path: Path) -> None:
    card = dataclasses.replace(card_of(PREFIXES["kv"]), metrics={"loss": 1.5, "bleu": np.nan})
    artifact.save(tmp_path / "p", PREFIXES["kv"], card)
    assert artifact.load(tmp_path / "p")[1].metrics == {"loss": 1.5, "bleu": None}


def test_metrics_may_be_text(stored: Path) -> None:
    edit_card(stored, lambda card: card.update(metrics={"judge": "good", "loss": None}))
    sign(stored)
    artifact.save(stored, *artifact.load(stored))
    assert artifact.load(stored)[1].metrics == {"judge": "good", "loss": None}


@in_both_containers
def test_accepts_a_relative_path(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored.parent)
    assert_equal(artifact.load(stored.name)[0], keys_values())


def test_accepts_a_run_directory(tmp_path: Path) -> None:
    produced = keys_values()
    artifact.save(tmp_path / "run" / "prefix", produced, card_of(produced))
    assert artifact.find(tmp_path / "run") == tmp_path / "run" / "prefix"
    assert_equal(artifact.load(tmp_path / "run")[0], produced)


def test_reports_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(PrefixError, match=r"no directory .*nowhere"):
        artifact.load(tmp_path / "nowhere")


def test_reports_a_directory_without_a_card(stored: Path) -> None:
    (stored / "prefix.json").unlink()
    with pytest.raises(PrefixError, match=r"no prefix in .* of a finished run"):
        artifact.load(stored)


@pytest.mark.parametrize("path", ["x" * 300, "~nosuchuser/prefix", "a\0b"])
def test_impossible_path_is_a_prefix_error(path: str) -> None:
    with pytest.raises(PrefixError, match="cannot"):
        artifact.load(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rejects_non_finite_keys(value: float, tmp_path: Path) -> None:
    produced = keys_values()
    inside = produced.decoder.inside
    assert inside is not None
    inside = dataclasses.replace(inside, k_LPKH=inside.k_LPKH.at[0, 0, 0, 0].set(value))
    produced = Prefix(Site(inside), text_position=5)
    with pytest.raises(PrefixError, match="k_LPKH has 1 values that are NaN or infinite"):
        artifact.save(tmp_path / "p", produced, card_of(produced))
    assert not (tmp_path / "p").exists()


def test_rejects_a_prefix_that_contradicts_its_card(tmp_path: Path) -> None:
    with pytest.raises(PrefixError, match="the card describes another prefix"):
        artifact.save(tmp_path / "p", keys_values(text_position=0), card_of(keys_values()))
    wrong = dataclasses.replace(
        card_of(keys_values()),
        geometry=dataclasses.replace(GEOMETRY, decoder=SiteShape(4, 4, 2, 8)),
    )
    with pytest.raises(
        PrefixError, match=r"k_LPKH is float32 \(3, 5, 2, 8\) instead of float32 \(4, 5"
    ):
        artifact.save(tmp_path / "p", keys_values(), wrong)


def test_rejects_a_prefix_without_slots() -> None:
    with pytest.raises(PrefixError, match="no slots"):
        make_card(Prefix(Site(KVPrefix(*[jnp.zeros((3, 0, 2, 8))] * 2))), GEOMETRY, BACKBONE)


def test_names_text_that_cannot_be_stored() -> None:
    produced = PREFIXES["embeds"]
    task = {"name": "text", "input": "{name} \ud800", "target": "{text}"}
    with pytest.raises(ConfigError, match=r"task\.input: not valid Unicode text"):
        dataclasses.replace(card_of(produced), task=task)
