"""`prefix-jax predict`."""

import io
import json
import sys
import types

import pytest

from prefix_jax.cli import predict as command
from prefix_jax.cli.main import main
from prefix_jax.evaluate.predictions import save_predictions
from prefix_jax.tasks import Prediction

HOSTILE = "no\x1b[2J\u202e"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def hostile_label(monkeypatch):
    """Makes every prefix predict a label with terminal escapes, for one record."""

    def predict(_records, batch_size, output):
        predictions = [Prediction("test.jsonl:1", "x", HOSTILE, ())]
        if output is not None:
            save_predictions(output, predictions)
        return predictions

    tuned = types.SimpleNamespace(head={}, predict=predict)
    settings = types.SimpleNamespace(evaluate=types.SimpleNamespace(batch_size=1))
    monkeypatch.setattr(command._stored, "load", lambda *_: (tuned, settings))


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_labels_are_escaped_only_on_a_terminal(hostile_label, monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream())
    assert main(["predict", "run", "--input", "test.jsonl"]) == 0
    label = HOSTILE if stream is io.StringIO else r"no\x1b[2J\u202e"
    assert sys.stdout.getvalue() == f"{label}\n"


def test_files_contain_labels_unchanged(hostile_label, tmp_path):
    output = tmp_path / "answers.jsonl"
    assert main(["predict", "run", "--input", "test.jsonl", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["prediction"] == HOSTILE
