"""Parquet: conversion of every type, and limits on the expanded size."""

from __future__ import annotations

import datetime
import decimal
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefix_jax.errors import DataError
from prefix_jax.untrusted import parquet
from prefix_jax.untrusted.parquet import read_parquet


def write(path: Path, values: Any, kind: Any = None) -> Path:
    pq.write_table(pa.table({"x": pa.array(values, kind)}), path)
    return path


def read(path: Path) -> list[Any]:
    return [fields["x"] for _, fields in read_parquet(path, DataError)]


def counts(values: list[int | None], kind: pa.DataType) -> pa.Array:
    """Dates and times from counts of their unit, which may be out of range for Python."""
    return pa.array(values, pa.int32() if kind.bit_width == 32 else pa.int64()).view(kind)


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (["a", None, "b", "a"], None, None),
        ([["a", None], None, [], ["b"]], None, None),
        ([[{"role": "user", "content": None}], None], None, None),
        ([{"text": ["q"], "answer_start": [3]}, None], None, None),
        ([[[1], []], None], None, None),
        ([True, None], None, None),
        ([1, None, 2**63], pa.uint64(), None),
        ([0.5, None], None, None),
        ([np.float16(0.5), None], pa.float16(), [0.5, None]),
        ([None, None], None, None),
        ([[1, 2]], pa.list_(pa.int32(), 2), None),
        ([b"ab", b"\xff", None], None, ["ab", b"\xff", None]),
        ([b"ab", b"\xff\xff"], pa.binary(2), ["ab", b"\xff\xff"]),
        ([decimal.Decimal("1.50"), None], None, ["1.50", None]),
        (
            [[("k", "v"), ("l", None)], None, []],
            pa.map_(pa.string(), pa.string()),
            [{"k": "v", "l": None}, None, {}],
        ),
        ([[(1, "v")]], pa.map_(pa.int64(), pa.string()), [[[1, "v"]]]),
        (
            [datetime.date(2026, 1, 2), None],
            None,
            ["2026-01-02", None],
        ),
        ([datetime.time(1, 2, 3, 40_000)], None, ["01:02:03.04"]),
        ([datetime.timedelta(seconds=2)], pa.duration("ms"), [2000]),
    ],
)
def test_values_round_trip(tmp_path: Path, values: Any, kind: Any, expected: Any) -> None:
    assert read(write(tmp_path / "a.parquet", values, kind)) == expected or values


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (counts([1, None], pa.timestamp("ns")), ["1970-01-01T00:00:00.000000001", None]),
        (counts([0, 2**40], pa.timestamp("s")), ["1970-01-01T00:00:00", "36812-02-20T00:36:16"]),
        (counts([0], pa.timestamp("us", "Mars/Base")), ["1970-01-01T00:00:00Z"]),
        (counts([9_404_918_380_800], pa.timestamp("s", "UTC")), ["300000-01-01T00:00:00Z"]),
        (counts([-(2**63)], pa.timestamp("ms")), [None]),
        (counts([2**31 - 1], pa.date32()), ["5881580-07-11"]),
    ],
)
def test_times_outside_the_range_of_python_become_strings(
    tmp_path: Path, array: pa.Array, expected: list[str | None]
) -> None:
    pq.write_table(pa.table({"x": array, "y": pa.nulls(len(array))}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == expected


@pytest.mark.parametrize(
    "encoding", ["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "RLE_DICTIONARY"]
)
def test_reads_text_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    texts, lists = ["one", None, "other"] * 1000, [["a", "b"], None, []] * 1000
    how: dict[str, Any] = {"use_dictionary": True}
    if encoding != "RLE_DICTIONARY":
        columns = {"x": encoding, "y.list.element": encoding}
        how = {"use_dictionary": False, "column_encoding": columns}
    pq.write_table(pa.table({"x": texts, "y": lists}), tmp_path / "a.parquet", **how)
    rows = [fields for _, fields in read_parquet(tmp_path / "a.parquet", DataError)]
    assert [row["x"] for row in rows] == texts
    assert [row["y"] for row in rows] == lists


def test_directory_names_add_no_column(tmp_path: Path) -> None:
    (tmp_path / "facts=5").mkdir()
    path = write(tmp_path / "facts=5" / "a.parquet", ["a"])
    assert list(read_parquet(path, DataError)) == [(1, {"x": "a"})]


def test_names_the_row_and_column_of_invalid_utf8(tmp_path: Path) -> None:
    array = pa.array([b"fine"] * 5000 + [b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"x": array}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet:5001: the column 'x' of type .*utf-8"):
        read(tmp_path / "a.parquet")


def test_rejects_duplicate_columns(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the column 'x' appears twice"):
        read(tmp_path / "a.parquet")
    array = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["y", "y"])
    pq.write_table(pa.table({"x": array}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet.*duplicate field"):
        read(tmp_path / "a.parquet")


def test_rejects_a_small_file_of_many_values_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    indices = pa.array(np.zeros(6_000_000, np.int8))
    pq.write_table(pa.table({"x": pa.DictionaryArray.from_arrays(indices, ["a"])}), path)
    assert path.stat().st_size < 20_000
    with pytest.raises(DataError, match=r"expands from .* bytes to more than 5,000,000 values"):
        read(path)
    lists = pa.ListArray.from_arrays([0, len(indices)], indices)
    pq.write_table(pa.table({"x": lists}), path)
    with pytest.raises(DataError, match="more than 5,000,000 values"):
        read(path)


def test_shared_text_counts_once_per_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MIN_TEXT", 10_000_000)
    path = write(tmp_path / "a.parquet", ["a" * 100_000] * 90)
    texts = read(path)
    assert len({id(text) for text in texts}) == 1
    with pytest.raises(
        DataError, match=r"a\.parquet: expands to more than 10,000,000 bytes of text"
    ):
        read(write(path, ["a" * 100_000] * 110))


def test_reports_files_that_are_not_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for content in (b"", b"PAR1", b"text", b"PAR1" * 100):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
            read(path)


def draw_type(rng: Random, depth: int = 0) -> pa.DataType:
    """A random nested type of lists, structs, maps, strings and numbers."""
    kinds = ["text", "words", "number", "flag"] + ["list", "struct", "map"] * (depth < 3)
    match rng.choice(kinds):
        case "text":
            return pa.string()
        case "words":
            return pa.dictionary(pa.int32(), pa.string())
        case "number":
            return rng.choice([pa.int8(), pa.uint32(), pa.float64()])
        case "flag":
            return pa.bool_()
        case "list":
            return pa.list_(draw_type(rng, depth + 1))
        case "struct":
            return pa.struct([(name, draw_type(rng, depth + 1)) for name in "ab"])
        case _:
            return pa.map_(pa.string(), draw_type(rng, depth + 1))


def draw_value(kind: pa.DataType, rng: Random) -> Any:
    if rng.random() < 0.2:
        return None
    if pa.types.is_map(kind):
        return {key: draw_value(kind.item_type, rng) for key in "kl"[: rng.randrange(3)]}
    if pa.types.is_struct(kind):
        return {field.name: draw_value(field.type, rng) for field in kind}
    if pa.types.is_list(kind):
        return [draw_value(kind.value_type, rng) for _ in range(rng.randrange(4))]
    if pa.types.is_boolean(kind):
        return rng.random() < 0.5
    texts = pa.types.is_string(kind) or pa.types.is_dictionary(kind)
    return rng.choice(["", "é", "abc"] if texts else [0, 1, 99])


def test_nested_values_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for case in range(150):
        rng = Random(case)
        kind = draw_type(rng)
        values = [draw_value(kind, rng) for _ in range(rng.choice((1, 7, 60)))]
        table = pa.table({"x": pa.array(values, kind)})
        pq.write_table(table, path, row_group_size=rng.choice((3, 100)), data_page_size=100)
        try:
            for group in range(pq.ParquetFile(path).num_row_groups):
                pq.ParquetFile(path).read_row_group(group)
        except pa.ArrowException:  # pyarrow 26 can write a few types that it cannot read
            with pytest.raises(DataError, match="not a readable Parquet file"):
                read(path)
        else:
            assert read(path) == values, kind
