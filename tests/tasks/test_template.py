import pytest

from prefix_jax.data.source import Record
from prefix_jax.errors import DataError
from prefix_jax.tasks.template import Template


def record(**fields):
    return Record(fields, "a.jsonl:3")


def test_fields_are_filled_and_doubled_braces_are_literal():
    template = Template("{{{x}}} is {y}, {x}")
    assert template.render(record(x="one", y=2)) == ["{one} is 2, one"]
    assert template.fields == ("x", "y", "x")


def test_values_are_inserted_unchanged():
    assert Template("{x}").render(record(x="{y} {{")) == ["{y} {{"]


def test_field_names_are_not_attribute_lookups():
    assert Template("{a.b}").render(Record({"a.b": "plain", "a": "no"}, "r")) == ["plain"]
    with pytest.raises(DataError, match=r"no field 'x\.__class__'"):
        Template("{x.__class__}").render(record(x="one"))
    with pytest.raises(DataError, match=r"no field 'x\[0\]'"):
        Template("{x[0]}").render(record(x="one"))


@pytest.mark.parametrize("text", ["{", "a } b", "{}", "{x!r}", "{x:>9}", "{x:{y}}"])
def test_rejects_braces_that_are_not_a_field(text):
    with pytest.raises(DataError, match="write a literal brace twice"):
        Template(text)


def test_rejects_two_lists_in_one_template():
    with pytest.raises(DataError, match="are both lists"):
        Template("{x} {y}").render(record(x=["a", "b"], y=["c"]))


def test_rejects_unpaired_surrogate():
    with pytest.raises(DataError, match=r"a\.jsonl:3: not valid Unicode text"):
        Template("{x}").render(record(x="\ud800"))


def test_rejects_nan_in_a_list():
    with pytest.raises(DataError, match=r"a\.jsonl:3: field 'x' contains NaN"):
        Template("{x}").render(record(x=["one", float("nan")]))


def test_rejects_too_many_alternatives():
    words = ["x"] * 10_000
    assert len(Template("{x}").render(record(x=words))) == 10_000
    with pytest.raises(DataError, match=r"a\.jsonl:3: field 'x' is a list of 10,001 texts"):
        Template("{x}").render(record(x=[*words, "x"]))
