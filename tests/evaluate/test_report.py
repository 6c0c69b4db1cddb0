"""Tests reports as strict JSON and as a table, and predictions as JSON lines."""

import io
import json
import math

import pytest
from rich.console import Console

from prefix_jax.errors import CheckpointError, DataError, PrefixJaxError
from prefix_jax.evaluate.report import (
    Prediction,
    Report,
    read_predictions,
    save_predictions,
    table,
)


def test_a_report_is_saved_as_json(tmp_path):
    path = tmp_path / "run" / "test.json"
    Report({"loss": 1.5, "bleu": 41.25}, {"bleu": "tok:13a|version:2.6.0"}, 40).save(path)
    assert json.loads(path.read_text()) == {
        "metrics": {"loss": 1.5, "bleu": 41.25},
        "signatures": {"bleu": "tok:13a|version:2.6.0"},
        "examples": 40,
    }


def test_non_finite_values_become_null(tmp_path):
    Report({"loss": math.nan, "perplexity": math.inf}, {}, 1).save(tmp_path / "test.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((tmp_path / "test.json").read_text(), parse_constant=refuse)
    assert content["metrics"] == {"loss": None, "perplexity": None}


def test_saves_one_prediction_per_line(tmp_path):
    made = [
        Prediction(
            "test.jsonl:1", "café[yes]\n", "There is a café.", ("A café.", "One\u2028café.")
        ),
        Prediction("test.jsonl:2", "", "", ("No.",)),
    ]
    save_predictions(tmp_path / "predictions.jsonl", iter(made))
    content = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    assert "café[yes]" in content
    first, second = map(json.loads, content.rstrip("\n").split("\n"))
    assert first == {
        "source": "test.jsonl:1",
        "prompt": "café[yes]\n",
        "prediction": "There is a café.",
        "references": ["A café.", "One\u2028café."],
    }
    assert second["references"] == ["No."]


def test_reads_saved_predictions(tmp_path):
    made = [
        Prediction("a:1", "One\u2028two\r\n", "x", ["A", ""]),
        Prediction("a:2", "", "", [], {"no": 0.25, "yes": 0.75}),
    ]
    save_predictions(tmp_path / "p.jsonl", made)
    assert read_predictions(tmp_path / "p.jsonl") == made


GOOD = {"source": "a:1", "prompt": "x", "prediction": "y", "references": ["z"], "scores": {"z": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "not a prediction; expected the fields source, prompt, .* got extra, "),
        ({"prompt": None}, "the field prompt must be a text, got None"),
        ({"source": 3}, "the field source must be a text, got 3"),
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


@pytest.mark.parametrize(
    "content",
    [
        [],
        None,
        {"metrics": [], "signatures": {}, "examples": 1},
        {"metrics": {"loss": "1"}, "signatures": {}, "examples": 1},
        {"metrics": {"loss": None}, "signatures": {"loss": 1}, "examples": 1},
        {"metrics": {"loss": 1.5}, "signatures": {}, "examples": None},
    ],
)
def test_rejects_edited_report(content):
    with pytest.raises(ValueError, match=r"must (be|map)"):
        Report.from_dict(content)


def test_the_table_sets_columns_side_by_side():
    grid = table(
        {
            "before": {"loss": 3.25, "bleu": 4.0},
            "after": {"loss": 0.5, "bleu": 72.125, "chrf": 81.0},
        },
        title="test, 40 inputs",
    )
    console = Console(file=io.StringIO(), width=60)
    console.print(grid)
    rows = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines()]
    assert ["test,", "40", "inputs"] in rows
    assert ["loss", "3.2500", "0.5000"] in rows
    assert ["bleu", "4.00", "72.12"] in rows
    assert ["chrf", "-", "81.00"] in rows


def test_write_error_names_the_file(tmp_path):
    (tmp_path / "run").write_text("a file where a folder should be")
    with pytest.raises(PrefixJaxError, match=r"cannot write .*test\.json"):
        Report({}, {}, 0).save(tmp_path / "run" / "test.json")
