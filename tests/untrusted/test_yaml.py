import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_jax.errors import ConfigError
from prefix_jax.untrusted.yaml import parse_yaml


def parse(text: str) -> Any:
    return parse_yaml(text, "here", ConfigError)


@given(st.text() | st.text(alphabet="[]{}&*!|>'\"%@`:,-?#ab01. \n\t~<="))
def test_any_text_parses_or_is_one_error(text: str):
    with contextlib.suppress(ConfigError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), (".5", 0.5), ("-1.", -1.0), ("1_000", 1000),
        ("010", 10), ("0o10", 8), ("0x10", 16), ("0b1", "0b1"),
        ("yes", "yes"), ("off", "off"), ("TRUE", True), ("", None), ("~", None), ("=", "="),
        ("2024-13-45", "2024-13-45"), ("1:30", "1:30"), ("1.2.3", "1.2.3"), ("1e", "1e"),
    ],
)  # fmt: skip
def test_reads_plain_scalars_of_yaml_1_2(text: str, value: object):
    assert parse(text) == value


@pytest.mark.parametrize("text", ["!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!int ''"])
def test_names_the_place_of_a_value_that_does_not_match_its_tag(text: str):
    with pytest.raises(ConfigError, match=r"not a value of type \w+ [\s\S]*line 1, column 4"):
        parse(f"a: {text}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 3000, "nested more than"),
        ("[" * 150 + "]" * 150, "nested more than"),
        ("9" * 5000, "not a value of type int"),
        ("a: &x [*x]", "alias inside its own anchor"),
        ("a: 1\na: 2", "duplicate key 'a'"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_reports_the_problem(text: str, message: str):
    with pytest.raises(ConfigError, match=f"here: [\\s\\S]*{message}"):
        parse(text)


@pytest.mark.parametrize("merge", ["", "<<: "])
def test_limits_the_expansion_of_aliases(merge: str):
    def layer(items: str) -> str:
        return f"{{{merge}[{items}]}}" if merge else f"[{items}]"

    lines = ["a0: &a0 {k: v}"]
    for number in range(1, 12):
        lines.append(f"a{number}: &a{number} {layer(', '.join([f'*a{number - 1}'] * 9))}")
    with pytest.raises(ConfigError, match="more than 100,000 values"):
        parse("\n".join(lines))


def test_expands_aliases_within_the_limits():
    assert parse("a: &x {b: 1}\nc: *x") == {"a": {"b": 1}, "c": {"b": 1}}
