"""`predict` prints one answer per line."""

import io
import json
import sys
import types

import pytest

from prefix_jax.cli import predict as verb
from prefix_jax.cli.main import main
from prefix_jax.evaluate.report import Prediction, save_predictions

HOSTILE = "no\x1b[2J\u202e"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def answering(monkeypatch):
    """Lets every prefix answer one record with a label that could steer a terminal."""

    def answers(_records, batch_size, output):
        made = [Prediction("test.jsonl:1", "x", HOSTILE, ())]
        if output is not None:
            save_predictions(output, made)
        return made

    tuned = types.SimpleNamespace(answers=answers)
    settings = types.SimpleNamespace(evaluate=types.SimpleNamespace(batch_size=1))
    monkeypatch.setattr(verb._stored, "load", lambda *_: (tuned, settings))


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_labels_are_escaped_only_on_a_terminal(answering, monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream())
    assert main(["predict", "run", "--input", "test.jsonl"]) == 0
    label = HOSTILE if stream is io.StringIO else r"no\x1b[2J\u202e"
    assert sys.stdout.getvalue() == f"{label}\n"


def test_files_hold_labels_unchanged(answering, tmp_path):
    output = tmp_path / "answers.jsonl"
    assert main(["predict", "run", "--input", "test.jsonl", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["prediction"] == HOSTILE
