"""CSV: limits, and errors that name the first line of the row."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from prefix_jax.errors import DataError
from prefix_jax.untrusted.csv import read_csv


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_yields_the_first_line_of_each_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'x,y\r\n"a\nb",1\r\n\r\nc,2')
    rows = [(2, {"x": "a\nb", "y": "1"}), (5, {"x": "c", "y": "2"})]
    assert list(read_csv(path, DataError)) == rows


def test_unclosed_quote_names_the_row_where_it_opens(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'x,y\n1,2\n"3,4\n' + "5,6\n" * 100)
    with pytest.raises(DataError, match=r"a\.csv:3: malformed CSV \(unexpected end of data\)"):
        list(read_csv(path, DataError))
    with pytest.raises(
        DataError, match=r"a\.csv:3: the row has more than 50 characters; check for"
    ):
        list(read_csv(path, DataError, row_limit=50))


def test_many_short_rows_do_not_reach_the_row_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "x,y\n" + "5,6\n" * 100)
    assert len(list(read_csv(path, DataError, row_limit=10))) == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x\n1\n\0\n", r"a\.csv:3: the line contains a null byte"),
        ("," * 10_000, r"a\.csv:1: 10,001 columns, at most 10,000 are supported"),
        ("x,y,x\n", r"a\.csv:1: the column 'x' appears twice"),
    ],
)
def test_rejects_malformed_tables(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_csv(write(tmp_path / "a.csv", text), DataError))


def test_keeps_the_field_limit_of_other_readers(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    rows = read_csv(write(tmp_path / "a.csv", "x\n1\n2\n"), DataError)
    next(rows)
    rows.close()
    assert csv.field_size_limit() == before
