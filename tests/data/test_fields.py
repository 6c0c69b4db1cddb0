"""What a record's fields hold is what a task can learn from, or an error that names them."""

from __future__ import annotations

from typing import Any

import pytest

from prefix_jax.config import TaskConfig
from prefix_jax.data.fields import collect_labels
from prefix_jax.data.source import read_records
from prefix_jax.errors import DataError


def test_labels_are_collected_by_size_or_letter() -> None:
    def collect(*labels: Any, name: str = "classify") -> tuple[str, ...]:
        records = read_records([{"label": label} for label in labels])
        return collect_labels(records, TaskConfig(name))

    assert collect(10, 9, 9) == ("9", "10")
    assert collect("no", "yes", "maybe") == ("maybe", "no", "yes")
    assert collect(["O", "B"], ["I"], name="tag") == ("B", "I", "O")
    with pytest.raises(DataError, match="one label, 'a'"):
        collect("a", "a")
    with pytest.raises(DataError, match="record 1: field 'label' holds a list where a label is"):
        collect(["a"], "b")
