"""Tests that records of published datasets get the formats of the papers."""

from __future__ import annotations

import pytest

from prefix_jax.data.source import Record
from prefix_jax.errors import ConfigError, DataError
from prefix_jax.tasks.prepare import fields_needed, prepare_records


def added(name: str, **fields) -> dict:
    (record,) = prepare_records([Record(fields, "x:1")], name)
    return {key: value for key, value in record.fields.items() if key not in fields}


def test_a_meaning_representation_becomes_pairs():
    text = "name[The Eagle], eatType[coffee shop], priceRange[£20-25, or more], near[Burger King]"
    assert added("e2e", mr=text) == {
        "source": "name : The Eagle | Type : coffee shop | price : £20-25, or more"
        " | near : Burger King"
    }


def test_triples_have_the_format_of_each_dataset():
    triples = ["Aarhus | cityServed | Denmark", ["A", "Elevation", 25]]
    assert added("web_nlg", input=triples) == {
        "source": " | Aarhus : cityServed : Denmark | A : Elevation : 25"
    }
    assert added("dart", tripleset=triples) == {
        "source": "Aarhus : cityserved : Denmark | A : elevation : 25"
    }


@pytest.mark.parametrize(
    ("question", "joiner"), [("cause", "because"), (0, "because"), ("effect", "so"), (1, "so")]
)
def test_premise_gets_connective_of_its_question(question, joiner):
    assert added("copa", premise="It rained.", question=question) == {
        "start": f"It rained. {joiner}"
    }


def test_numeric_labels_become_names():
    assert added("sst2", label=1) == {"answer": "positive"}
    assert added("rte", label="entailment") == {"answer": "entailment"}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("e2e", {"mr": "The Eagle is a pub"}, "expected the form 'name"),
        ("e2e", {"mr": "name[A], and more"}, "expected the form"),
        ("e2e", {"mr": 3}, "must be a text, got int"),
        ("e2e", {"meaning": "name[A]"}, "no field 'mr'"),
        ("web_nlg", {"input": "a | b | c"}, "must be a non-empty list of triples"),
        ("dart", {"tripleset": ["a | b"]}, "'a | b' in field 'tripleset' is not a triple"),
        ("mrpc", {"label": -1}, "the label must be not_equivalent, equivalent or .*, got -1"),
        ("copa", {"premise": "P.", "question": "why"}, "must be 'cause' or 'effect', got 'why'"),
    ],
)
def test_error_names_record_of_another_dataset(name, fields, message):
    with pytest.raises(DataError, match=f"x:1: .*{message}"):
        prepare_records([Record(fields, "x:1")], name)


def test_unknown_name_gets_a_hint():
    with pytest.raises(ConfigError, match="did you mean 'e2e'"):
        prepare_records([], "e2")
    with pytest.raises(ConfigError, match=r"data.prepare '': choose one of e2e"):
        fields_needed(("source",), "")


def test_without_a_name_records_stay_as_they_are():
    record = Record({"a": 1}, "x:1")
    assert prepare_records([record], None) == [record]


def test_what_a_record_must_have_is_known_from_the_template():
    assert fields_needed(("id", "start"), "copa") == ("id", "premise", "question")
    assert fields_needed(("source",), None) == ("source",)
