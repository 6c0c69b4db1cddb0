"""Tests decoding and scoring of a head's outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from prefix_jax.config import METRICS_OF, TaskConfig
from prefix_jax.data.batch import Example, Window
from prefix_jax.errors import DataError
from prefix_jax.evaluate.answers import read_answers, score_answers

CONTEXT = "the cat sat on a mat"


def example(label: Any, *references: str, **fields: Any) -> Example:
    label_M = np.asarray(label)
    index_M = np.arange(len(label_M), dtype=np.int32)
    return Example(np.zeros(9, np.int32), index_M, label_M, "x", references, **fields)


def scores(task: TaskConfig, examples: list[Example], outputs: Any, *names: str) -> dict:
    answers = read_answers(task, examples, [np.array(out, np.float32) for out in outputs])
    found = score_answers(task, names or METRICS_OF[task.name][1:], answers)
    return {name: pytest.approx(score.value, abs=0.01) for name, score in found.items()}


def classes(labels: tuple[str, ...], right: list[int], found: list[int]) -> dict:
    task = TaskConfig("classify", labels=labels)
    examples = [example([i], labels[i]) for i in right]
    return scores(task, examples, [[np.eye(len(labels))[i]] for i in found])


def test_classes() -> None:
    """With two labels, the last one is positive."""
    found = classes(("no", "yes"), [1, 1, 1, 0, 0], [1, 1, 0, 0, 1])
    assert found == {"accuracy": 60, "f1": 66.667, "f1_macro": 58.333, "matthews": 16.667}
    assert classes(("a", "b", "c"), [0, 1, 2], [0, 1, 1])["f1"] == 55.556
    assert classes(("no", "yes"), [1, 1], [0, 0]) == {
        "accuracy": 0, "f1": 0, "f1_macro": 0, "matthews": 0,
    }  # fmt: skip


def test_class_has_probability_of_every_label() -> None:
    task = TaskConfig("classify", labels=("no", "yes"))
    (answer,) = read_answers(task, [example([1], "yes")], [np.log([[1.0, 3.0]])])
    assert answer.prediction.prediction == "yes"
    assert answer.prediction.scores == pytest.approx({"no": 0.25, "yes": 0.75})


def test_values() -> None:
    task = TaskConfig("regress")
    examples = [example(np.float32([v]), str(v)) for v in (1, 2, 3, 4)]
    assert scores(task, examples, [[[1]], [[3]], [[2]], [[9]]]) == {
        "pearson": 82.62, "spearman": 80,
    }  # fmt: skip


def test_entity_f1_counts_whole_entities() -> None:
    labels = ("O", "B-PER", "I-PER", "B-LOC")
    task = TaskConfig("tag", labels=labels)
    right = [[1, 2, 0, 3], [0, 3]]
    found = [[1, 0, 0, 3], [0, 3]]
    examples = [example(row, *(labels[i] for i in row)) for row in right]
    outputs = [np.eye(4)[row] for row in found]
    assert scores(task, examples, outputs) == {"accuracy": 83.333, "f1": 66.667}
    answer = read_answers(task, examples, outputs)[0].prediction
    assert (answer.prediction, answer.references) == ("B-PER O O B-LOC", ("B-PER I-PER O B-LOC",))


def test_choices() -> None:
    task = TaskConfig("choice", choices=("{a}", "{b}"))
    fields = {"candidates": True, "choices": ("one", "two")}
    examples = [example([0, 1], "two", **fields), example([1, 0], "one", **fields)]
    assert scores(task, examples, [[[0], [5]], [[0], [5]]]) == {"accuracy": 50}


# Spans: [CLS] who [SEP] the cat sat on a mat

_ENDS = np.cumsum([len(word) + 1 for word in CONTEXT.split()]) - 1
_OFFSETS = np.array([[-1, -1]] * 3 + [
    [end - len(word), end] for word, end in zip(CONTEXT.split(), _ENDS, strict=True)
])  # fmt: skip


def span(*references: str, question: int = 0) -> Example:
    window = Window(question, CONTEXT, _OFFSETS)
    return example(np.zeros(9, np.int32), *references, candidates=True, window=window)


def logits(**scores: tuple[int, float]) -> np.ndarray:
    out_T2 = np.zeros((9, 2))
    for name, (column, value) in scores.items():
        out_T2[column, int(name.startswith("end"))] = value
    return out_T2


def test_the_best_span_ends_where_it_starts_or_later() -> None:
    task = TaskConfig("span")
    backwards = logits(start=(5, 9), end=(4, 9), end_too=(6, 5))
    (answer,) = read_answers(task, [span("sat on")], [backwards])
    assert answer.prediction.prediction == "sat on"
    short = TaskConfig("span", answer_tokens=1)
    (answer,) = read_answers(short, [span("sat")], [logits(start=(5, 9), end=(8, 5))])
    assert answer.prediction.prediction == "sat"


def test_the_best_of_several_windows_answers() -> None:
    windows = [span("mat"), span("mat")]
    outputs = [logits(start=(4, 1), end=(4, 1)), logits(start=(8, 2), end=(8, 2))]
    (answer,) = read_answers(TaskConfig("span"), windows, outputs)
    assert answer.prediction.prediction == "mat"


def test_unanswerable_task_may_predict_no_answer() -> None:
    nothing = logits(start=(0, 9), end=(0, 9), start_too=(4, 1), end_too=(4, 1))
    nothing[4] = 1
    for unanswerable, expected in ((True, ""), (False, "cat")):
        task = TaskConfig("span", unanswerable=unanswerable)
        (answer,) = read_answers(task, [span("")], [nothing])
        assert answer.prediction.prediction == expected


def test_spans_are_compared_as_squad_does() -> None:
    questions = [span("The cat!", question=0), span("on the mat", "a mat", question=1)]
    outputs = [logits(start=(4, 9), end=(4, 9)), logits(start=(6, 9), end=(8, 9))]
    found = scores(TaskConfig("span"), questions, outputs)
    assert found == {"exact_match": 100, "f1": 100}
    half = scores(TaskConfig("span"), [span("cat sat")], [logits(start=(4, 9), end=(4, 9))])
    assert half == {"exact_match": 0, "f1": 66.667}


def test_rejects_scoring_without_labels() -> None:
    with pytest.raises(DataError, match="have no labels"):
        classes(("a", "b"), [], [])
    task = TaskConfig("regress")
    with pytest.raises(DataError, match="have no labels"):
        scores(task, [example(np.float32([0]))], [[[1]]])
