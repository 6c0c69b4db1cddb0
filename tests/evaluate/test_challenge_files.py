"""Tests the files for official scoring scripts."""

from __future__ import annotations

import pytest

from prefix_jax.errors import DataError
from prefix_jax.evaluate.challenge_files import write_challenge_files
from prefix_jax.tasks import Prediction

MADE = [
    Prediction("t:1", "name : A", " A is\na pub. ", ["A is a pub.", "There is a pub, A."]),
    Prediction("t:2", "name : B", "", ["B."]),
]


def test_writes_predictions_and_references_for_the_scripts(tmp_path):
    files = write_challenge_files(tmp_path / "official", MADE)
    assert {file.name: file.read_text() for file in files} == {
        "hypotheses.txt": "A is a pub.\n\n",
        "references.e2e.txt": "A is a pub.\nThere is a pub, A.\n\nB.\n\n",
        "reference0": "A is a pub.\nB.\n",
        "reference1": "There is a pub, A.\n\n",
    }


def test_error_names_prediction_without_references(tmp_path):
    with pytest.raises(DataError, match="t:3: no references"):
        write_challenge_files(tmp_path, [*MADE, Prediction("t:3", "", "C", [])])
