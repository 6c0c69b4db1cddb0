"""Tests regression: examples, predictions and scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from heads import example, read, scores

from prefix_jax.errors import DataError
from prefix_jax.tasks import Regress


def test_regression_label_must_be_a_number(bert: Any) -> None:
    (example,) = read(bert, Regress("{t}"), {"t": "a", "label": "2.5"})
    assert (example.label_M.dtype, example.label_M.tolist()) == (np.float32, [2.5])
    with pytest.raises(DataError, match="must be a number, got 'much'"):
        read(bert, Regress("{t}"), {"t": "a", "label": "much"})
    for infinite in ("inf", 1e39, 10**400):
        with pytest.raises(DataError, match="must be finite"):
            read(bert, Regress("{t}"), {"t": "a", "label": infinite})


def test_values() -> None:
    task = Regress("{t}")
    examples = [example(np.float32([v]), str(v)) for v in (1, 2, 3, 4)]
    assert scores(task, examples, [[[1]], [[3]], [[2]], [[9]]]) == {
        "pearson": 82.62, "spearman": 80,
    }  # fmt: skip
