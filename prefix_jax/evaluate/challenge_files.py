"""Predictions in the formats that the official scripts of published benchmarks read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from prefix_jax.errors import DataError
from prefix_jax.evaluate.report import write_lines
from prefix_jax.tasks import Prediction


def write_challenge_files(directory: str | Path, predictions: Sequence[Prediction]) -> list[Path]:
    """Writes one prediction per line, and the references in the two formats that scripts expect.

        hypotheses.txt           one prediction per line
        references.e2e.txt       the references of each input, separated by blank lines
                                 (e2e-metrics: BLEU, NIST, METEOR, ROUGE-L, CIDEr)
        reference0, reference1…  the first reference of each input, the second… (multi-bleu, the
                                 scripts of WebNLG and DART); an empty line if there are fewer

    Args:
        directory: created if it does not exist; existing files of these names are overwritten.
        predictions: the predictions in the order of the inputs.

    Returns:
        The paths of the files.

    Raises:
        DataError: a prediction has no references.
        PrefixJaxError: a file cannot be written.
    """
    directory = Path(directory)
    for prediction in predictions:
        if not prediction.references:
            raise DataError(
                f"{prediction.origin}: no references; the official scripts need at least one"
            )
    groups = [[_line(text) for text in prediction.references] for prediction in predictions]
    contents = {
        "hypotheses.txt": [_line(prediction.prediction) for prediction in predictions],
        "references.e2e.txt": [line for group in groups for line in (*group, "")],
    }
    for number, column in enumerate(itertools.zip_longest(*groups, fillvalue="")):
        contents[f"reference{number}"] = list(column)
    for name, lines in contents.items():
        write_lines(directory / name, lines)
    return [directory / name for name in contents]


def _line(text: str) -> str:
    """Puts a text on one line, because a line break would begin another example."""
    return " ".join(text.split())
