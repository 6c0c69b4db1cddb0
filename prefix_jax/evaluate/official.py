"""Predictions in the formats that the official scripts of published benchmarks read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from prefix_jax.errors import DataError
from prefix_jax.evaluate.report import Prediction, write_lines


def write_official(directory: str | Path, predictions: Sequence[Prediction]) -> list[Path]:
    """Writes a prediction a line, and the references in both forms that scripts want.

        hypotheses.txt           a prediction a line
        references.e2e.txt       the references of each, a blank line between (e2e-metrics: BLEU,
                                 NIST, METEOR, ROUGE-L, CIDEr)
        reference0, reference1…  the first reference of each, the second… (multi-bleu, the scripts
                                 of WebNLG and DART); empty where there are fewer

    Args:
        directory: is made if it is not there; files of these names are replaced.
        predictions: in the order of the inputs.

    Returns:
        The files.

    Raises:
        DataError: a prediction has no references.
        PrefixJaxError: a file cannot be written.
    """
    directory = Path(directory)
    for made in predictions:
        if not made.references:
            raise DataError(f"{made.source}: no references, which official scripts compare with")
    groups = [[_line(text) for text in made.references] for made in predictions]
    contents = {
        "hypotheses.txt": [_line(made.prediction) for made in predictions],
        "references.e2e.txt": [line for group in groups for line in (*group, "")],
    }
    for number, column in enumerate(itertools.zip_longest(*groups, fillvalue="")):
        contents[f"reference{number}"] = list(column)
    for name, lines in contents.items():
        write_lines(directory / name, lines)
    return [directory / name for name in contents]


def _line(text: str) -> str:
    """The text on one line: a line break would begin another example."""
    return " ".join(text.split())
