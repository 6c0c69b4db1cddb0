"""Tests that records become labelled examples with the tokenizer's own special tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tiny

from prefix_jax.backbones.loading.tokenizer import load_tokenizer
from prefix_jax.config import TaskConfig
from prefix_jax.data.labelled import Reading
from prefix_jax.data.pack import Packing, arrange, materialise, measure
from prefix_jax.data.source import read_records
from prefix_jax.errors import DataError


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(tiny.write_encoder(tmp_path_factory.mktemp("bert") / "model"))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("roberta") / "model"
    return load_tokenizer(tiny.write_encoder(path, "roberta"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(tiny.write_model(tmp_path_factory.mktemp("llama") / "model"))


def reading(tokenizer: Any, task: TaskConfig, **fields: Any) -> Reading:
    options = {"input": None, "pair": None, "max_length": 64, "truncate": "right"}
    return Reading(tokenizer, task, **{**options, "causal": False, "segments": True, **fields})


def examples(tokenizer: Any, task: TaskConfig, *records: dict[str, Any], **fields: Any) -> Any:
    return reading(tokenizer, task, **fields).examples(read_records(records))


# Classes and values.

CLASSES = TaskConfig("classify", labels=("bad", "good"))


def test_encoder_predicts_label_of_pair_from_first_token(bert: Any) -> None:
    record = {"a": "the film", "b": "was great", "label": "good"}
    (one,) = examples(bert, CLASSES, record, input="{a}", pair="{b}")
    assert bert.decode(one.ids_T) == "[CLS] the film [SEP] was great [SEP]"
    assert one.token_type_T.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert (one.index_M.tolist(), one.label_M.tolist(), one.references) == ([0], [1], ("good",))


def test_decoder_predicts_label_from_last_token(decoder: Any) -> None:
    record = {"text": "abc", "label": 0}
    (one,) = examples(decoder, CLASSES, record, input="{text}", causal=True, segments=False)
    assert (one.index_M.tolist(), one.references) == ([2], ("bad",))
    assert one.token_type_T is None


def test_long_text_is_truncated_and_reported(bert: Any) -> None:
    record = {"text": "the a good bad film", "label": "bad"}
    found = examples(bert, CLASSES, record, input="{text}", max_length=4)
    assert bert.decode(found[0].ids_T) == "[CLS] the a [SEP]"
    left = examples(bert, CLASSES, record, input="{text}", max_length=4, truncate="left")
    assert bert.decode(left[0].ids_T) == "[CLS] bad film [SEP]"
    assert found.truncated == left.truncated == ("record 1",)


@pytest.mark.parametrize("label", ["fine", 2, -1, 0.5])
def test_unknown_label_error_names_the_record(bert: Any, label: Any) -> None:
    with pytest.raises(DataError, match=r"record 1: the label .* is not one of 'bad', 'good'"):
        examples(bert, CLASSES, {"text": "a", "label": label}, input="{text}")


def test_regression_label_must_be_a_number(bert: Any) -> None:
    (one,) = examples(bert, TaskConfig("regress"), {"t": "a", "label": "2.5"}, input="{t}")
    assert (one.label_M.dtype, one.label_M.tolist()) == (np.float32, [2.5])
    with pytest.raises(DataError, match="must be a number, got 'much'"):
        examples(bert, TaskConfig("regress"), {"t": "a", "label": "much"}, input="{t}")
    for infinite in ("inf", 1e39, 10**400):
        with pytest.raises(DataError, match="must be finite"):
            examples(bert, TaskConfig("regress"), {"t": "a", "label": infinite}, input="{t}")


def test_prediction_does_not_need_labels(bert: Any) -> None:
    read = reading(bert, CLASSES, input="{t}")
    (one,) = read.examples(read_records([{"t": "good"}]), answered=False)
    assert one.references == ()


# Tags.

TAGS = TaskConfig("tag", labels=("O", "B"))


@pytest.mark.parametrize("kind", ["bert", "roberta", "decoder"])
def test_tag_is_predicted_from_first_token_of_word(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    words = ["xyz", "is", "-", "great"]
    record = {"tokens": words, "label": ["B", "O", "O", "B"]}
    (one,) = examples(tokenizer, TAGS, record, causal=kind == "decoder")
    firsts = [tokenizer.decode([one.ids_T[column]]).strip(" #")[:1] for column in one.index_M]
    # The space before a word may be part of its first token, or a separate token.
    assert all(first in ("", word[0]) or word.startswith(first)
               for first, word in zip(firsts, words, strict=True))  # fmt: skip
    assert one.label_M.tolist() == [1, 0, 0, 1]
    assert (np.diff(one.index_M) > 0).all()


def test_truncated_words_have_no_tag(bert: Any) -> None:
    record = {"tokens": ["good", "xyz", "film"], "label": ["B", "O", "B"]}
    found = examples(bert, TAGS, record, max_length=5)
    assert found[0].references == ("B", "O")
    assert found.truncated == ("record 1",)


def test_word_must_be_a_text_or_a_number(bert: Any) -> None:
    task = TaskConfig("tag", labels=("O", "B"))
    (one,) = examples(bert, task, {"tokens": ["film", 3], "label": ["O", "B"]})
    assert one.prompt == "film 3"
    with pytest.raises(DataError, match=r"record 1: words in field 'tokens' must be .*, got list"):
        examples(bert, task, {"tokens": ["film", ["a"]], "label": ["O", "B"]})
    with pytest.raises(DataError, match="record 1: not valid Unicode"):
        examples(bert, task, {"tokens": ["film", "\ud800"], "label": ["O", "B"]})


def test_every_word_needs_a_tag(bert: Any) -> None:
    with pytest.raises(DataError, match="record 1: 1 tags in 'label' for 2 words in 'tokens'"):
        examples(bert, TAGS, {"tokens": ["a", "b"], "label": ["O"]})


# Spans.

SPANS = TaskConfig("span", label="answers", stride=3)
CONTEXT = "the film was very great , the plot was bad , paris was where"


def spans(tokenizer: Any, text: str, start: int, **fields: Any) -> Any:
    answers = {"text": [text], "answer_start": [start]} if text else {"text": []}
    record = {"q": "where was", "c": CONTEXT, "answers": answers}
    given = {"input": "{q}", "pair": "{c}", "max_length": 13, **fields}
    task = dataclasses.replace(SPANS, unanswerable=given.pop("unanswerable", False))
    return examples(tokenizer, task, record, **given)


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
        examples(bert, SPANS, record, input="{q}", pair="{c}")


def test_long_text_becomes_overlapping_windows(bert: Any) -> None:
    found = spans(bert, "paris", CONTEXT.index("paris"))
    assert len(found) == 3
    assert {one.window.question for one in found} == {0}
    for one in found:
        assert len(one.ids_T) <= 13
        start, end = (int(np.flatnonzero(one.label_M & bit)[0]) for bit in (1, 2))
        text = "".join(CONTEXT[slice(*one.window.offset_T2[start])])
        assert (start, end) == (0, 0) or text == "paris"
    assert any(one.label_M[0] == 0 for one in found)
    starts = [one.window.offset_T2[one.window.offset_T2[:, 0] >= 0][0, 0] for one in found]
    assert starts == sorted(set(starts))


def test_unanswerable_question_targets_first_token(bert: Any) -> None:
    for one in spans(bert, "", 0, unanswerable=True):
        assert one.label_M[0] == 3
        assert one.references == ("",)


def test_rejects_missing_answer_unless_unanswerable_is_set(bert: Any) -> None:
    with pytest.raises(DataError, match=r"record 1: .* has no answer; .*task\.unanswerable"):
        spans(bert, "", 0)


def test_answer_must_be_at_its_offset(bert: Any) -> None:
    with pytest.raises(DataError, match=r"the answer .* at character 3, got ' film'"):
        spans(bert, "paris", 3)


def test_a_question_must_leave_room_for_the_text(bert: Any) -> None:
    with pytest.raises(DataError, match="leave no room for the text within max_length 8"):
        spans(bert, "", 0, max_length=8)


# Choices.


def test_choices_do_not_attend_to_each_other(bert: Any) -> None:
    task = TaskConfig("choice", choices=("{one}", "{two}"))
    records = [
        {"q": "the film was", "one": "good", "two": "very bad", "label": 1},
        {"q": "the plot was", "one": "very great", "two": "awful", "label": 0},
    ]
    found = examples(bert, task, *records, input="{q}")
    assert found[0].index_M.tolist() == [0, 7]
    assert found[0].label_M.tolist() == [0, 1]
    assert found[0].references == ("very bad",)
    batch = materialise(arrange(measure(found), Packing()), found)
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
    task = TaskConfig("choice", choices=("{ends}",))
    record = {"q": "the", "ends": ["film", "plot", "a"], "label": "2"}
    (one,) = examples(bert, task, record, input="{q}")
    assert one.choices == ("film", "plot", "a")
    assert one.label_M.tolist() == [0, 0, 1]
    with pytest.raises(
        DataError, match=r"the choice 3 .* is not one of '0', '1', '2'; choices are counted"
    ):
        examples(bert, task, {**record, "label": 3}, input="{q}")
