"""Tests span extraction: examples, predictions and scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from heads import example, read, scores

from prefix_jax.data.batch import Example, Window
from prefix_jax.errors import DataError
from prefix_jax.tasks import ExtractSpan

SPANS = ExtractSpan("{q}", "{c}", label="answers", stride=3)
CONTEXT = "the film was very great , the plot was bad , paris was where"


def spans(tokenizer: Any, text: str, start: int, **fields: Any) -> Any:
    answers = {"text": [text], "answer_start": [start]} if text else {"text": []}
    record = {"q": "where was", "c": CONTEXT, "answers": answers}
    return read(tokenizer, SPANS, record, **{"max_length": 13, **fields})


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": "film", "answer_start": 4}, "must have answers in SQuAD's format"),
        ({"text": ["film"], "answer_start": []}, "has 1 text and 0 answer_start entries"),
        ({"text": ["film"]}, "has 1 text and 0 answer_start entries"),
        ([{"text": "film"}], "every answer needs a text and an answer_start"),
    ],
)
def test_rejects_answers_in_another_format(bert: Any, answers: Any, message: str) -> None:
    record = {"q": "where", "c": "the film", "answers": answers}
    with pytest.raises(DataError, match=f"record 1: .*{message}"):
        read(bert, SPANS, record)


def test_long_text_becomes_overlapping_windows(bert: Any) -> None:
    windows = spans(bert, "paris", CONTEXT.index("paris"))
    assert len(windows) == 3
    assert {window.window.question for window in windows} == {0}
    for window in windows:
        assert len(window.ids_T) <= 13
        start, end = (int(np.flatnonzero(window.label_M & bit)[0]) for bit in (1, 2))
        text = "".join(CONTEXT[slice(*window.window.offset_T2[start])])
        assert (start, end) == (0, 0) or text == "paris"
    assert any(window.label_M[0] == 0 for window in windows)
    starts = [
        window.window.offset_T2[window.window.offset_T2[:, 0] >= 0][0, 0] for window in windows
    ]
    assert starts == sorted(set(starts))


def test_unanswerable_question_targets_first_token(bert: Any) -> None:
    for window in spans(bert, "", 0, unanswerable=True):
        assert window.label_M[0] == 3
        assert window.references == ("",)


def test_rejects_missing_answer_unless_unanswerable_is_set(bert: Any) -> None:
    with pytest.raises(DataError, match=r"record 1: .* has no answer; .*task\.unanswerable"):
        spans(bert, "", 0)


def test_answer_must_be_at_its_offset(bert: Any) -> None:
    with pytest.raises(DataError, match=r"the answer .* at character 3, got ' film'"):
        spans(bert, "paris", 3)


def test_a_question_must_leave_room_for_the_text(bert: Any) -> None:
    with pytest.raises(DataError, match="leave no room for the text within max_length 8"):
        spans(bert, "", 0, max_length=8)


TEXT = "the cat sat on a mat"


_ENDS = np.cumsum([len(word) + 1 for word in TEXT.split()]) - 1


_OFFSETS = np.array([[-1, -1]] * 3 + [
    [end - len(word), end] for word, end in zip(TEXT.split(), _ENDS, strict=True)
])  # fmt: skip


def span(*references: str, question: int = 0) -> Example:
    window = Window(question, TEXT, _OFFSETS)
    return example(np.zeros(9, np.int32), *references, candidates=True, window=window)


def logits(**scores: tuple[int, float]) -> np.ndarray:
    out_T2 = np.zeros((9, 2))
    for name, (column, value) in scores.items():
        out_T2[column, int(name.startswith("end"))] = value
    return out_T2


def test_the_best_span_ends_where_it_starts_or_later() -> None:
    task = ExtractSpan()
    backwards = logits(start=(5, 9), end=(4, 9), end_too=(6, 5))
    (answer,) = task.predictions([span("sat on")], [backwards])
    assert answer.prediction == "sat on"
    short = ExtractSpan(answer_tokens=1)
    (answer,) = short.predictions([span("sat")], [logits(start=(5, 9), end=(8, 5))])
    assert answer.prediction == "sat"


def test_the_best_of_several_windows_answers() -> None:
    windows = [span("mat"), span("mat")]
    outputs = [logits(start=(4, 1), end=(4, 1)), logits(start=(8, 2), end=(8, 2))]
    (answer,) = ExtractSpan().predictions(windows, outputs)
    assert answer.prediction == "mat"


def test_unanswerable_task_may_predict_no_answer() -> None:
    nothing = logits(start=(0, 9), end=(0, 9), start_too=(4, 1), end_too=(4, 1))
    nothing[4] = 1
    for unanswerable, expected in ((True, ""), (False, "cat")):
        task = ExtractSpan(unanswerable=unanswerable)
        (answer,) = task.predictions([span("")], [nothing])
        assert answer.prediction == expected


def test_spans_are_compared_as_squad_does() -> None:
    questions = [span("The cat!", question=0), span("on the mat", "a mat", question=1)]
    outputs = [logits(start=(4, 9), end=(4, 9)), logits(start=(6, 9), end=(8, 9))]
    measured = scores(ExtractSpan(), questions, outputs)
    assert measured == {"exact_match": 100, "f1": 100}
    half = scores(ExtractSpan(), [span("cat sat")], [logits(start=(4, 9), end=(4, 9))])
    assert half == {"exact_match": 0, "f1": 66.667}
