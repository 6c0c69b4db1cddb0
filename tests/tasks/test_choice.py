"""Tests multiple choice: examples, predictions and scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from heads import example, read, scores

from prefix_jax.data.pack import Packing, arrange, collate, measure
from prefix_jax.errors import DataError
from prefix_jax.tasks import MultipleChoice


def test_choices_do_not_attend_to_each_other(bert: Any) -> None:
    task = MultipleChoice("{q}", ("{one}", "{two}"))
    records = [
        {"q": "the film was", "one": "good", "two": "very bad", "label": 1},
        {"q": "the plot was", "one": "very great", "two": "awful", "label": 0},
    ]
    examples = read(bert, task, *records, input="{q}")
    assert examples[0].index_M.tolist() == [0, 7]
    assert examples[0].label_M.tolist() == [0, 1]
    assert examples[0].references == ("very bad",)
    batch = collate(arrange(measure(examples), Packing()), examples)
    assert batch.weight_BM.sum() == 2
    for row in range(len(batch.ids_BT)):
        group = batch.layout.segment_BT[row]
        for number in range(1, group.max() + 1):
            columns = np.flatnonzero(group == number)
            assert batch.layout.position_BT[row, columns].tolist() == list(range(len(columns)))
            assert batch.ids_BT[row, columns[0]] == bert.cls_token_id
        real = batch.question_BM[row] > 0
        assert (np.bincount(batch.question_BM[row][real])[1:] == 2).all()


def test_list_field_gives_one_choice_per_text(bert: Any) -> None:
    task = MultipleChoice("{q}", ("{ends}",))
    record = {"q": "the", "ends": ["film", "plot", "a"], "label": "2"}
    (example,) = read(bert, task, record, input="{q}")
    assert example.choices == ("film", "plot", "a")
    assert example.label_M.tolist() == [0, 0, 1]
    with pytest.raises(
        DataError, match=r"the choice 3 .* is not one of '0', '1', '2'; choices are counted"
    ):
        read(bert, task, {**record, "label": 3}, input="{q}")


def test_choices() -> None:
    task = MultipleChoice(choices=("{a}", "{b}"))
    fields = {"candidates": True, "choices": ("one", "two")}
    examples = [example([0, 1], "two", **fields), example([1, 0], "one", **fields)]
    assert scores(task, examples, [[[0], [5]], [[0], [5]]]) == {"accuracy": 50}
