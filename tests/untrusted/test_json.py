import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_jax.errors import DataError
from prefix_jax.untrusted.json import MAX_DEPTH, parse_json, read_json, read_json_object

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(_VALUES)
def test_reads_what_json_writes(value: Any):
    assert parse_json(json.dumps(value), "here", DataError, unique_keys=True) == value


@given(st.text() | st.text(alphabet='[]{}":,0123456789eE+-.tfn\\u '))
def test_any_text_parses_or_is_one_error(text: str):
    with contextlib.suppress(DataError):
        parse_json(text, "here", DataError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a" 1}', r"malformed JSON \(.* at column 6\)"),
        ('{"a": 1,\n "b"}', r"malformed JSON \(.* at line 2, column 5\)"),
        ("[" * 100_000, "nested more than"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "nested more than"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested more than"),
        ("9" * 5_000, "JSON with an integer of more than 4,300 digits$"),
    ],
)
def test_reports_the_problem(text: str, message: str):
    with pytest.raises(DataError, match=f"here: .*{message}"):
        parse_json(text, "here", DataError)


def test_accepts_the_maximum_depth():
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "here", DataError)


def test_rejects_duplicate_keys_if_asked():
    with pytest.raises(DataError, match="the key 'a' appears twice"):
        parse_json('{"b": {"a": 1, "a": 2}}', "here", DataError, unique_keys=True)


def test_reports_the_type_of_a_file_that_is_not_an_object(tmp_path: Path):
    file = tmp_path / "index.json"
    for content, kind in (("[1]", "an array"), ("null", "null"), ("true", "true"), ("3", "number")):
        file.write_text(content)
        assert read_json(file, DataError) == json.loads(content)
        with pytest.raises(DataError, match=rf"index\.json: expected a JSON object, got .*{kind}"):
            read_json_object(file, DataError)
