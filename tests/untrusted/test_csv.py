"""Rows of CSV are bounded, and every failure names the first line of its row."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from prefix_jax.errors import DataError
from prefix_jax.untrusted.csv import read_csv


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_rows_have_the_number_of_their_first_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'x,y\r\n"a\nb",1\r\n\r\nc,2')
    rows = [(2, {"x": "a\nb", "y": "1"}), (5, {"x": "c", "y": "2"})]
    assert list(read_csv(path, DataError)) == rows


def test_a_quote_left_open_names_the_row_where_it_opens(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'x,y\n1,2\n"3,4\n' + "5,6\n" * 100)
    with pytest.raises(DataError, match=r"a\.csv:3: malformed CSV \(unexpected end of data\)"):
        list(read_csv(path, DataError))
    with pytest.raises(DataError, match=r"a\.csv:3: a row of more than 50 characters; is a double"):
        list(read_csv(path, DataError, row_limit=50))


def test_many_short_rows_are_no_long_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "x,y\n" + "5,6\n" * 100)
    assert len(list(read_csv(path, DataError, row_limit=10))) == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x\n1\n\0\n", r"a\.csv:3: a null byte"),
        ("," * 10_000, r"a\.csv:1: 10,001 columns; at most 10,000 are read"),
        ("x,y,x\n", r"a\.csv:1: the header names the column 'x' twice"),
    ],
)
def test_refuses_what_is_not_a_table_of_texts(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_csv(write(tmp_path / "a.csv", text), DataError))


def test_the_limit_of_other_readers_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    rows = read_csv(write(tmp_path / "a.csv", "x\n1\n2\n"), DataError)
    next(rows)
    rows.close()
    assert csv.field_size_limit() == before
