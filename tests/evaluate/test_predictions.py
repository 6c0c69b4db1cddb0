"""Tests that predictions are stored and read."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from mutations import attempt, dump_json, mutate_bytes, mutate_json

from prefix_jax.errors import CheckpointError, DataError
from prefix_jax.evaluate.predictions import read_predictions, save_predictions
from prefix_jax.tasks import Prediction


def test_saves_one_prediction_per_line(tmp_path):
    predictions = [
        Prediction(
            "test.jsonl:1", "café[yes]\n", "There is a café.", ("A café.", "One\u2028café.")
        ),
        Prediction("test.jsonl:2", "", "", ("No.",)),
    ]
    save_predictions(tmp_path / "predictions.jsonl", iter(predictions))
    content = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    assert "café[yes]" in content
    first, second = map(json.loads, content.rstrip("\n").split("\n"))
    assert first == {
        "origin": "test.jsonl:1",
        "prompt": "café[yes]\n",
        "prediction": "There is a café.",
        "references": ["A café.", "One\u2028café."],
    }
    assert second["references"] == ["No."]


def test_reads_saved_predictions(tmp_path):
    predictions = [
        Prediction("a:1", "One\u2028two\r\n", "x", ["A", ""]),
        Prediction("a:2", "", "", [], {"no": 0.25, "yes": 0.75}),
    ]
    save_predictions(tmp_path / "p.jsonl", predictions)
    assert read_predictions(tmp_path / "p.jsonl") == predictions


GOOD = {"origin": "a:1", "prompt": "x", "prediction": "y", "references": ["z"], "scores": {"z": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "not a prediction; expected the fields origin, prompt, .* got extra, "),
        ({"prompt": None}, "the field prompt must be a text, got None"),
        ({"origin": 3}, "the field origin must be a text, got 3"),
        ({"prediction": ["y"]}, r"the field prediction must be a text, got \['y'\]"),
        ({"references": "z"}, "the field references must be a list of texts, got 'z'"),
        ({"references": [None]}, "the field references must be a list of texts"),
        ({"scores": {"z": "1"}}, "the field scores must be numbers by name, or null"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
    ],
)
def test_edited_prediction_error_names_the_line(tmp_path, change, message):
    path = tmp_path / "p.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD | change)}\n")
    with pytest.raises(CheckpointError, match=rf"p\.jsonl:2: {message}"):
        read_predictions(path, CheckpointError)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff", b"[" * 5000, b"1" * 5000])
def test_damaged_predictions_are_one_error(tmp_path, content):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"p\.jsonl:1: "):
        read_predictions(path)


def test_mutated_predictions_come_back_or_are_one_error(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    predictions = [
        Prediction("a:1", "x", "y", ["z"], {"z": 0.5}),
        Prediction("a:2", "é", "", ["\u2028"]),
    ]
    save_predictions(path, predictions)
    original = path.read_bytes()
    objects = [json.loads(line) for line in original.splitlines()]
    for case in range(300):
        rng = Random(case)
        changed = [dump_json(row) for row in mutate_json(objects, rng)]
        path.write_bytes(mutate_bytes(original, rng) if case % 2 else b"\n".join(changed))
        read, message = attempt(read_predictions, path)
        if message is not None:
            assert message.startswith(str(path))
        else:
            save_predictions(path, read)
            assert read_predictions(path) == read or "NaN" in path.read_text()
