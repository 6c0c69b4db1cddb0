"""Tests classification: examples, predictions and scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from heads import example, read, scores

from prefix_jax.data.source import read_records
from prefix_jax.errors import DataError
from prefix_jax.tasks import Classify, Reader, Regress

CLASSES = Classify("{text}", labels=("bad", "good"))


def test_encoder_predicts_label_of_pair_from_first_token(bert: Any) -> None:
    record = {"a": "the film", "b": "was great", "label": "good"}
    (example,) = read(bert, CLASSES, record, input="{a}", pair="{b}")
    assert bert.decode(example.ids_T) == "[CLS] the film [SEP] was great [SEP]"
    assert example.token_type_T.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert (example.index_M.tolist(), example.label_M.tolist(), example.references) == (
        [0],
        [1],
        ("good",),
    )


def test_decoder_predicts_label_from_last_token(decoder: Any) -> None:
    record = {"text": "abc", "label": 0}
    (example,) = read(decoder, CLASSES, record, input="{text}", causal=True, token_types=False)
    assert (example.index_M.tolist(), example.references) == ([2], ("bad",))
    assert example.token_type_T is None


def test_long_text_is_truncated_and_reported(bert: Any) -> None:
    record = {"text": "the a good bad film", "label": "bad"}
    examples = read(bert, CLASSES, record, input="{text}", max_length=4)
    assert bert.decode(examples[0].ids_T) == "[CLS] the a [SEP]"
    left = read(bert, CLASSES, record, input="{text}", max_length=4, truncate="left")
    assert bert.decode(left[0].ids_T) == "[CLS] bad film [SEP]"
    assert examples.truncated == left.truncated == ("record 1",)


@pytest.mark.parametrize("label", ["fine", 2, -1, 0.5])
def test_unknown_label_error_names_the_record(bert: Any, label: Any) -> None:
    with pytest.raises(DataError, match=r"record 1: the label .* is not one of 'bad', 'good'"):
        read(bert, CLASSES, {"text": "a", "label": label})


def test_prediction_does_not_need_labels(bert: Any) -> None:
    (example,) = CLASSES.examples(read_records([{"text": "good"}]), Reader(bert), answers=False)
    assert example.references == ()


def classes(labels: tuple[str, ...], right: list[int], predicted: list[int]) -> dict:
    task = Classify(labels=labels)
    examples = [example([i], labels[i]) for i in right]
    return scores(task, examples, [[np.eye(len(labels))[i]] for i in predicted])


def test_classes() -> None:
    """With two labels, the last one is positive."""
    scores = classes(("no", "yes"), [1, 1, 1, 0, 0], [1, 1, 0, 0, 1])
    assert scores == {"accuracy": 60, "f1": 66.667, "f1_macro": 58.333, "matthews": 16.667}
    assert classes(("a", "b", "c"), [0, 1, 2], [0, 1, 1])["f1"] == 55.556
    assert classes(("no", "yes"), [1, 1], [0, 0]) == {
        "accuracy": 0, "f1": 0, "f1_macro": 0, "matthews": 0,
    }  # fmt: skip


def test_class_has_probability_of_every_label() -> None:
    task = Classify(labels=("no", "yes"))
    (answer,) = task.predictions([example([1], "yes")], [np.log([[1.0, 3.0]])])
    assert answer.prediction == "yes"
    assert answer.scores == pytest.approx({"no": 0.25, "yes": 0.75})


def test_rejects_scoring_without_labels() -> None:
    with pytest.raises(DataError, match="have no labels"):
        classes(("a", "b"), [], [])
    task = Regress()
    with pytest.raises(DataError, match="have no labels"):
        scores(task, [example(np.float32([0]))], [[[1]]])
