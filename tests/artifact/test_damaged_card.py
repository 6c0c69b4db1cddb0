"""Damaged, edited and impossible cards are errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from stored_prefixes import HEAD, LAYERS, TASK, card_of, edit_card, keys_values, sign

from prefix_jax import artifact
from prefix_jax.artifact import store
from prefix_jax.errors import PrefixError
from tests.mutations import dump_json, mutate_json, refusal


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"format_version": 1'])
def test_reports_a_truncated_card(content: bytes, stored: Path) -> None:
    (stored / "prefix.json").write_bytes(content)
    with pytest.raises(PrefixError, match=r"prefix\.json: .*; copy it again from"):
        artifact.load(stored)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format_version": "1"}'])
def test_rejects_json_that_is_not_a_card(content: str, stored: Path) -> None:
    (stored / "prefix.json").write_text(content)
    with pytest.raises(PrefixError, match="not the card of a prefix"):
        artifact.load(stored)


def test_newer_format_asks_for_an_upgrade(stored: Path) -> None:
    edit_card(stored, lambda card: card.update(format_version=5, package="3.0", kind="gated"))
    with pytest.raises(PrefixError, match=r"format 5, written by prefix_jax 3\.0.*--upgrade"):
        artifact.load(stored)


def test_reports_all_invalid_card_fields_at_once(stored: Path) -> None:
    def change(card: dict[str, Any]) -> None:
        card["kind"] = "gated"
        card["geometry"]["decoder"]["layers"] = "three"
        del card["text_position"]

    edit_card(stored, change)
    with pytest.raises(PrefixError) as error:
        artifact.load(stored)
    for part in (
        "kind: must be one of embeds",
        "geometry.decoder.layers: must be a positive integer",
        "text_position: missing",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("text_position", 3), ("steps", 7), ("created", "yesterday"), ("decode", {"num_beams": 4})],
)
def test_rejects_an_edited_card(key: str, value: Any, stored: Path) -> None:
    edit_card(stored, lambda card: card.update({key: value}))
    with pytest.raises(PrefixError, match=r"prefix\.json was modified: .*sha25"):
        artifact.load(stored)


def test_rejects_a_card_without_its_digest(stored: Path) -> None:
    edit_card(stored, lambda card: card.pop("sha256"))
    with pytest.raises(PrefixError, match="it records None"):
        artifact.load(stored)


@pytest.mark.parametrize("value", [float("nan"), "\ud800"])
def test_rejects_a_card_that_could_not_be_saved_again(value: Any, stored: Path) -> None:
    edit_card(stored, lambda card: card.update(decode={"x": value}))
    sign(stored)
    with pytest.raises(PrefixError, match=r"prefix\.json is damaged: "):
        artifact.load(stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_position": -50}, "text_position: must be a non-negative integer"),
        ({"length": -1}, "length: must be a non-negative integer"),
        ({"steps": -1}, "steps: must be a non-negative integer"),
        ({"positions": [-1, 0, 1, 2, 3]}, "positions: must be a list"),
        ({"positions": [4, 3, 2, 1, 0]}, "positions must count from 0"),
        ({"layers": {"decoder": [0, 1, 9]}}, "layers.decoder must ascend from 0 to at most 2"),
        ({"layers": {"decoder": [2, 1, 0]}}, "layers.decoder must ascend"),
        ({"layers": {"cross": [0]}}, "there is no cross in the geometry"),
        ({"geometry": {"d_model": 0, "vocab": 96}}, "d_model: must be a positive integer"),
        (
            {"geometry": {"d_model": 32, "vocab": 96, "decoder": {
                "layers": 10**12, "query_heads": 4, "kv_heads": 2, "head_dim": 8}}},
            "decoder.layers: must be a positive integer",
        ),
        (
            {"tokenizer": {"name": "x", "size": -1, "sha256": ""}},
            "tokenizer.size: must be a non-negative integer",
        ),
        ({"length": 10**9}, r"instead of float32 \(3, 1000000000, 2, 8\)"),
    ],
)  # fmt: skip
def test_rejects_a_card_with_impossible_numbers(
    change: dict[str, Any], message: str, stored: Path
) -> None:
    edit_card(stored, lambda card: card.update(change))
    sign(stored)
    with pytest.raises(PrefixError, match=message):
        artifact.load(stored)


def test_rejects_a_deeply_nested_card(stored: Path) -> None:
    (stored / "prefix.json").write_text("[" * 100_000)
    with pytest.raises(PrefixError, match="nested more than"):
        artifact.load(stored)


@pytest.mark.parametrize("signed", [False, True])
def test_mutated_cards_load_or_raise_one_error(signed: bool, tmp_path: Path) -> None:
    card = dataclasses.replace(card_of(keys_values()), task=TASK, head=LAYERS)
    artifact.save(tmp_path / "p", keys_values(), card, "safetensors", head=HEAD)
    file, rng = tmp_path / "p" / "prefix.json", Random(0)
    fields = json.loads(file.read_text())
    refused = 0
    for _ in range(300):
        mutated = mutate_json(fields, rng)
        if dump_json(mutated) == dump_json(fields):
            mutated = None
        if signed and isinstance(mutated, dict):
            mutated["sha256"] = store._digest(mutated)
        file.write_bytes(dump_json(mutated))
        message = refusal(lambda: artifact.load_head(tmp_path / "p"), PrefixError)
        assert message is None or str(tmp_path / "p") in message
        refused += message is not None
    assert refused == 300 if not signed else 150 < refused < 300
