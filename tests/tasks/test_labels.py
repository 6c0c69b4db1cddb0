"""Tests that fields of labelled records are validated, and that errors name them."""

from __future__ import annotations

from typing import Any

import pytest

from prefix_jax.data.source import Record, read_records
from prefix_jax.errors import ConfigError, DataError
from prefix_jax.tasks import Classify, Tag
from prefix_jax.tasks.labels import LabelEncoder
from prefix_jax.tasks.regress import number_of
from prefix_jax.tasks.span import answers_of

CLASSES = Classify()


def collect(*labels: Any, task: Any = CLASSES) -> tuple[str, ...] | None:
    return task.collect(read_records([{"label": label} for label in labels])).labels


def number(names: tuple[str, ...], label: Any) -> int:
    return LabelEncoder(names).index(Record({}, "a.jsonl:7"), "label", label)


def test_sorts_labels_by_value_or_alphabetically() -> None:
    assert collect(10, 9, 9) == ("9", "10")
    assert collect(0.5, 10, 9) == ("0.5", "9", "10")
    assert collect("no", "yes", "maybe") == ("maybe", "no", "yes")
    assert collect(["O", "B"], ["I"], task=Tag()) == ("B", "I", "O")
    with pytest.raises(DataError, match="one label, 'a'"):
        collect("a", "a")
    with pytest.raises(DataError, match=r"record 1: field 'label' must be .*, got list"):
        collect(["a"], "b")


def test_spellings_of_a_number_are_one_label() -> None:
    assert collect(1, 1.0, "1", 2, -0.0, 0) == ("0", "1", "2")
    with pytest.raises(DataError, match="record 2: field 'label' is NaN"):
        collect(1, float("nan"))
    with pytest.raises(DataError, match="record 1: field 'label' is inf, expected a label"):
        collect(float("inf"), 1)
    with pytest.raises(DataError, match="record 1: field 'label' is nan, expected a label"):
        collect([float("nan")], ["a"], task=Tag())


@pytest.mark.parametrize("label", ["", " "])
def test_rejects_empty_label(label: str) -> None:
    with pytest.raises(DataError, match=r"record 2: field 'label' is '.*', expected a label"):
        collect("a", label)
    with pytest.raises(DataError, match=r"record 1: field 'label' is '.*', expected a label"):
        collect(["a", label], task=Tag())
    with pytest.raises(ConfigError, match="labels contains an empty tag"):
        Tag(labels=("O", label))


def test_rejects_mix_of_booleans_and_other_labels() -> None:
    assert collect(True, False, True) == ("false", "true")
    assert number(("false", "true"), True) == 1
    with pytest.raises(DataError, match=r"record 3: field 'label' is True, but .* 1 it is not a"):
        collect(1, 2, True)
    with pytest.raises(DataError, match=r"record 2: field 'label' is 'true', but .* 1 it is a"):
        collect(True, "true")
    with pytest.raises(DataError, match=r"record 1: .* use booleans in every record"):
        collect([True, "x"], task=Tag())


def test_boolean_is_not_a_label_index() -> None:
    for names in (("1", "2"), ("no", "yes")):
        with pytest.raises(DataError, match=r"a\.jsonl:7: the label True .* as 'true' and 'false'"):
            number(names, True)


def test_accepts_label_spellings_of_earlier_versions() -> None:
    assert number(("False", "True"), True) == 1
    assert number(("0.0", "1.0"), 1.0) == 1


def test_number_is_an_index_only_if_no_label_name_is_a_number() -> None:
    assert [number(("bad", "good"), label) for label in (0, 1, 1.0, "good")] == [0, 1, 1, 1]
    assert [number(("1", "2", "3"), label) for label in (1, "2", 3.0)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"a\.jsonl:7: the label 0 .* a name, not an index"):
        number(("1", "2", "3"), 0)
    with pytest.raises(DataError, match="a number is a name, not an index"):
        number(("1", "2", "many"), 0)


def test_rejects_label_that_cannot_be_stored() -> None:
    bad = Record({"label": "\ud800"}, "a.jsonl:1")
    with pytest.raises(DataError, match=r"a\.jsonl:1: the label '\\ud800' is not valid Unicode"):
        Classify().collect([bad, Record({"label": "b"}, "a.jsonl:2")])
    with pytest.raises(DataError, match=r"record 2: the label 'x.* has 2,000 characters"):
        collect("a", "x" * 2000)


@pytest.mark.parametrize("value", [True, "much", [1], {"a": 1}, "nan"])
def test_rejects_value_that_is_not_a_number(value: Any) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:7: field 'y' must be a number, got"):
        number_of(Record({}, "a.jsonl:7"), "y", value)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"text": "paris", "answer_start": -10}], "at character -10, got ''"),
        ([{"text": "in", "answer_start": True}], "needs a text and an answer_start"),
        ({"text": ["paris", ""], "answer_start": [3, 0]}, "one of 2 answers is empty"),
    ],
)
def test_rejects_answer_that_is_not_in_the_text(answers: Any, message: str) -> None:
    record = Record({"answers": answers}, "a.jsonl:7")
    with pytest.raises(DataError, match=message):
        answers_of(record, "answers", "in paris rain")


def test_empty_answer_means_no_answer() -> None:
    record = Record({"answers": {"text": [""], "answer_start": [0]}}, "a.jsonl:7")
    assert answers_of(record, "answers", "in paris") == []
