"""Tests that a stored head answers only the task that it was trained for."""

from __future__ import annotations

import types
from typing import Any

import pytest

from prefix_jax.artifact import TaskCard
from prefix_jax.errors import PrefixError
from prefix_jax.evaluate.answerer import Answerer

LABELS = {"name": "classify", "labels": ["bad", "good"]}
HEAD = {"kind": "classify", "outputs": 2}


def answerer(config: Any, head: Any) -> Answerer:
    card: Any = types.SimpleNamespace(task=TaskCard(config=config, head=head, shapes={}))
    pretrained: Any = None
    return Answerer(pretrained, None, {}, card)


def test_the_task_has_its_labels() -> None:
    assert answerer(LABELS, HEAD).task.labels == ("bad", "good")


@pytest.mark.parametrize(
    ("config", "head", "message"),
    [
        ({**LABELS, "labels": ["a", "b", "c"]}, HEAD, "classify with 3 outputs, got .* with 2"),
        ({"name": "classify"}, HEAD, "classify with 0 outputs, got .* with 2"),
        ({"name": "span"}, HEAD, "a head for span with 2 outputs, got classify"),
        ({"name": "regress"}, {"kind": "regress", "outputs": 2}, "regress with 1 outputs"),
        ({**LABELS, "stride": "x"}, HEAD, "prefix.json: task: stride: .*; the card is damaged"),
        (LABELS, {**HEAD, "kind": "x"}, "prefix.json: task: kind: .*; the card is damaged"),
        (LABELS, [], "prefix.json: task: .*; the card is damaged"),
    ],
)
def test_rejects_card_whose_task_does_not_match_its_head(
    config: Any, head: Any, message: str
) -> None:
    with pytest.raises(PrefixError, match=message):
        _ = answerer(config, head).task
