"""Tests reports as strict JSON and as a table, and predictions as JSON lines."""

import json
import math

import pytest

from prefix_jax.errors import PrefixJaxError
from prefix_jax.evaluate.report import Report


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


def test_write_error_names_the_file(tmp_path):
    (tmp_path / "run").write_text("a file where a folder should be")
    with pytest.raises(PrefixJaxError, match=r"cannot write .*test\.json"):
        Report({}, {}, 0).save(tmp_path / "run" / "test.json")
