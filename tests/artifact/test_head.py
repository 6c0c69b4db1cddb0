"""The head of a task is stored with its prefix."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from stored_prefixes import (
    CONTAINERS,
    HEAD,
    LAYERS,
    TASK,
    card_of,
    edit_card,
    keys_values,
    random,
    sign,
)

from prefix_jax import artifact
from prefix_jax.errors import PrefixError


@pytest.mark.parametrize("container", CONTAINERS)
def test_head_round_trips_with_its_prefix(container: artifact.Container, tmp_path: Path) -> None:
    card = dataclasses.replace(card_of(keys_values()), task=TASK, head=LAYERS)
    artifact.save(tmp_path / "a", keys_values(), card, container, head=HEAD)
    produced, loaded = artifact.load(tmp_path / "a")
    assert (loaded.task, loaded.head) == (TASK, LAYERS)
    assert loaded.head_shapes == {"out_DY": (32, 2), "out_bias_Y": (2,)}
    np.testing.assert_array_equal(
        produced.decoder.inside.k_LPKH, keys_values().decoder.inside.k_LPKH
    )
    head = artifact.load_head(tmp_path / "a")
    assert sorted(head) == sorted(HEAD)
    for name, x in HEAD.items():
        np.testing.assert_array_equal(head[name], x)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({}, "head.out_DY is missing"),
        ({**HEAD, "dense_DE": random(32, 32)}, "head.dense_DE is unknown"),
        ({**HEAD, "out_bias_Y": random(3)}, r"head.out_bias_Y is float32 \(3,\) instead of"),
        ({**HEAD, "out_bias_Y": jnp.array([jnp.nan, 0])}, "head.out_bias_Y has values that"),
    ],
)
def test_rejects_a_head_that_contradicts_its_card(head: Any, message: str, tmp_path: Path) -> None:
    card = dataclasses.replace(card_of(keys_values()), task=TASK, head=LAYERS)
    with pytest.raises(PrefixError, match=message):
        artifact.save(tmp_path / "a", keys_values(), card, head=head)
    assert not (tmp_path / "a").exists()


def test_prefix_without_a_task_has_no_head(stored: Path) -> None:
    assert artifact.load_head(stored) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": {}}, "head.outputs: missing"),
        ({"head": {"outputs": 0}}, "head.outputs: must be an integer in"),
        ({"head": {"outputs": 2, "bias": 1}}, "head.bias: must be true or false"),
        ({"head": {"outputs": 2, "activation": "x"}}, "unknown activation 'x'"),
        ({"head": {"outputs": 2, "code": "x"}}, "head.code: unknown key"),
        ({"head": {"outputs": 2, "dropout": 1.5}}, "head.dropout: must be a number in"),
        ({"task": None}, "a head needs a task"),
        ({"task": {"labels": ["a", "b"]}}, "task must have a name"),
    ],
)
def test_rejects_a_stored_head_that_is_invalid(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    card = dataclasses.replace(card_of(keys_values()), task=TASK, head=LAYERS)
    artifact.save(tmp_path / "a", keys_values(), card, head=HEAD)
    edit_card(tmp_path / "a", lambda fields: fields.update(change))
    sign(tmp_path / "a")
    with pytest.raises(PrefixError, match=rf"prefix\.json is damaged:\n.*{message}"):
        artifact.load(tmp_path / "a")
