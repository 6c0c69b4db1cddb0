"""Prefixes of earlier formats still load."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from stored_prefixes import assert_equal, edit_card, keys_values, sign

from prefix_jax import artifact

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_loads_format_2_without_a_digest(stored: Path) -> None:
    edit_card(stored, lambda card: (card.pop("sha256"), card.update(format_version=2)))
    produced, card = artifact.load(stored)
    assert_equal(produced, keys_values())
    assert card.format_version == 2
    artifact.save(stored, produced, card)
    assert artifact.load(stored)[1] == dataclasses.replace(
        card, format_version=artifact.FORMAT_VERSION
    )


@pytest.mark.parametrize("version", [2, 3])
def test_formats_2_and_3_still_load(version: int, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "format3" / "text" / "prefix", tmp_path / "old")
    if version == 2:  # the same without a digest
        edit_card(
            tmp_path / "old", lambda card: (card.pop("sha256"), card.update(format_version=2))
        )
    produced, card = artifact.load(tmp_path / "old")
    assert (card.format_version, card.method) == (
        version,
        {"name": "prefix", "length": 2, "mid_dim": 3},
    )
    assert card.text_position == produced.text_position == 2
    assert {"num_beams": 2, "num_samples": 2, "no_repeat_ngram_size": 3}.items() <= (
        card.decode.items()
    )
    artifact.save(tmp_path / "new", produced, card)
    again, renewed = artifact.load(tmp_path / "new")
    assert_equal(again, produced)
    assert renewed == dataclasses.replace(card, format_version=artifact.FORMAT_VERSION)


@pytest.mark.parametrize("version", [3, 4])
def test_multitask_prefix_with_former_names_still_loads(version: int, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(FIXTURES / "format3" / "text" / "prefix", old)
    if version == 4:
        artifact.save(old, *artifact.load(old))
    former = {"name": "multitask", "tasks": ["first", "sum"], "task": "sum"}

    def change(card: dict[str, Any]) -> None:
        card["method"] = former
        if version == 3:
            card["template"]["task"] = "kind"
        else:
            card["dataset"] = {"field": "kind", "name": "sum"}

    edit_card(old, change)
    sign(old)
    _, card = artifact.load(old)
    assert card.format_version == version
    assert card.method == {"name": "multitask", "datasets": ["first", "sum"], "dataset": "sum"}
    assert card.dataset == artifact.DatasetCard(field="kind", name="sum")


def test_format_3_with_a_head_still_loads() -> None:
    directory = FIXTURES / "format3" / "classify"
    _, card = artifact.load(directory)
    assert card.task == {
        "name": "classify", "prepare": None, "max_length": None, "truncate": "left",
        "label": "label", "input": "{text}", "pair": None, "labels": ["no", "yes"],
        "dropout": 0.1, "reads_soft": False,
    }  # fmt: skip
    assert card.head is not None
    assert card.head.outputs == 2
    assert artifact.load_head(directory)["out_DY"].shape == (32, 2)
