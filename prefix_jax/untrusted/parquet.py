"""Reads Parquet files within limits on the number of values and the size of their text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prefix_jax.errors import PrefixJaxError, reason
from prefix_jax.untrusted.paths import open_binary

MAX_COLUMNS = 10_000
# A file of a few kB can expand to billions of values. Each limit is the larger of a constant, which
# can be read in seconds, and a multiple of the file's size, which ordinary tables never reach.
MIN_VALUES, VALUES_PER_BYTE = 5_000_000, 4
MIN_TEXT, TEXT_PER_BYTE = 2**30, 50
# Rows to decode at once; fewer if repeated texts are decoded once per row.
_BATCH, _SMALL_BATCH = 4096, 512


def read_parquet(
    path: str | os.PathLike[str], error: type[PrefixJaxError]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number of each row, from 1, and the row as {column: value}.

    Lists, structs and maps with string keys become lists and dicts; numbers stay numbers. Dates,
    times and timestamps become ISO 8601 strings (with "Z" if they have a time zone, because Parquet
    stores them in UTC), durations become counts of their unit, decimals become strings, and bytes
    become strings if they are UTF-8. Directory names such as "lang=en/" add no columns.

    Args:
        path: the file.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if the file is missing, unreadable or malformed, has two
            columns of the same name, contains a type without a Python equivalent, or exceeds the
            limits of this module.
    """
    with open_binary(path, error) as (file, size):
        try:
            table = pq.ParquetFile(file)
            _check_sizes(table.metadata, size, str(path), error)
            names = list(table.schema_arrow.names)
            if duplicate := next((name for name in names if names.count(name) > 1), None):
                raise error(f"{path}: the column {duplicate[:60]!r} appears twice; rename one")
            shared, others = _text_columns(table)
            table = pq.ParquetFile(file, read_dictionary=shared)
            number, text = 0, _TextCounter(max(MIN_TEXT, TEXT_PER_BYTE * size), str(path), error)
            for batch in _batches(table, _SMALL_BATCH if others else _BATCH):
                columns = [
                    _column(column, name, number, str(path), text, error)
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                ]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield number, dict(zip(names, values, strict=True))
        except PrefixJaxError:
            raise
        except Exception as failure:  # malformed files make pyarrow raise many kinds of exceptions
            raise error(f"{path}: not a readable Parquet file ({reason(failure)})") from failure


class _TextCounter:
    """Counts the bytes of text that a file has expanded to."""

    def __init__(self, limit: int, path: str, error: type[PrefixJaxError]):
        self.limit = limit
        self.path = path
        self.error = error
        self.total = 0

    def add(self, size: int) -> None:
        """Adds to the count; raises the caller's error if it exceeds the limit."""
        self.total += size
        if self.total > self.limit:
            raise self.error(
                f"{self.path}: expands to more than {self.limit:,} bytes of text; remove "
                "columns or split the file"
            )

    def fresh(self) -> _TextCounter:
        """Returns a new counter with the same limit."""
        return _TextCounter(self.limit, self.path, self.error)


def _batches(table: pq.ParquetFile, rows: int) -> Iterator[pa.RecordBatch]:
    # One row group at a time: dictionaries inside lists cannot be joined.
    for group in range(table.num_row_groups):
        yield from table.iter_batches(batch_size=rows, row_groups=[group])


def _text_columns(table: pq.ParquetFile) -> tuple[list[str], bool]:
    """Returns the text columns that can be read as dictionaries, and whether there are others.

    A dictionary stores repeated texts once. pyarrow does not support this inside lists and structs,
    nor for delta encodings.
    """
    metadata = table.metadata
    shared, others = [], False
    for number in range(metadata.num_columns):
        column = metadata.schema.column(number)
        if column.physical_type != "BYTE_ARRAY" or column.logical_type.type == "DECIMAL":
            continue
        encodings = {
            encoding
            for group in range(metadata.num_row_groups)
            for encoding in metadata.row_group(group).column(number).encodings
        }
        flat = column.path == column.name and column.max_repetition_level == 0
        if flat and not any(encoding.startswith("DELTA") for encoding in encodings):
            shared.append(column.path)
        else:
            others = True
    return shared, others


def _check_sizes(
    metadata: pq.FileMetaData, size: int, path: str, error: type[PrefixJaxError]
) -> None:
    """Raises `error` if the file exceeds the limits according to its footer."""
    if metadata.num_columns > MAX_COLUMNS:
        raise error(
            f"{path}: {metadata.num_columns:,} columns, at most {MAX_COLUMNS:,} are supported"
        )
    values = data = 0
    max_values = max(MIN_VALUES, VALUES_PER_BYTE * size)
    for row_group in map(metadata.row_group, range(metadata.num_row_groups)):
        values += row_group.num_rows
        for column in range(metadata.num_columns):
            chunk = row_group.column(column)
            values += chunk.num_values
            width = max(metadata.schema.column(column).length, 0)  # -1 unless of fixed length
            data += max(chunk.total_uncompressed_size, width * chunk.num_values)
        if values > max_values:
            raise error(
                f"{path}: expands from {size:,} bytes to more than {max_values:,} values; remove "
                "columns or split the file"
            )
        if data > (limit := max(MIN_TEXT, TEXT_PER_BYTE * size)):
            raise error(
                f"{path}: expands from {size:,} bytes to more than {limit:,}; remove columns or "
                "split the file"
            )


def _column(
    column: pa.Array,
    name: str,
    before: int,
    path: str,
    text: _TextCounter,
    error: type[PrefixJaxError],
) -> list[Any]:
    """Converts a column of a batch whose first row is number `before` + 1."""
    try:
        return _values(column, text)
    except PrefixJaxError:
        raise
    except Exception as failure:
        number = next(
            (i for i in range(len(column)) if not _is_readable(column[i : i + 1], text)), 0
        )
        raise error(
            f"{path}:{before + number + 1}: the column {name[:60]!r} of type {column.type} cannot "
            f"be read ({reason(failure)})"
        ) from failure


def _is_readable(array: pa.Array, text: _TextCounter) -> bool:
    try:
        _values(array, text.fresh())
    except Exception:
        return False
    return True


def _values(array: pa.Array, text: _TextCounter) -> list[Any]:
    """Converts an array to Python values."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _values(array.storage, text)
    if pa.types.is_dictionary(kind):
        return _dictionary(array, text)
    if pa.types.is_map(kind):
        return _maps(array, text)
    if pa.types.is_struct(kind):
        return _structs(array, text)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _lists(array, text)
    if pa.types.is_temporal(kind):
        return _times(array)
    if pa.types.is_decimal(kind):
        return [None if value is None else format(value, "f") for value in array.to_pylist()]
    if pa.types.is_float16(kind):
        array = array.cast(pa.float32())
    if pa.types.is_null(kind) or (pa.types.is_primitive(kind) and array.null_count):
        return list(array.to_pylist())
    try:
        values: list[Any] = array.to_numpy(zero_copy_only=False).tolist()
    except pa.ArrowException:  # not UTF-8; to_pylist raises a clearer error
        values = array.to_pylist()
    if not pa.types.is_primitive(kind):
        text.add(sum(len(value) for value in values if value is not None))
    return [_decoded(value) for value in values] if _is_binary(kind) else values


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _decoded(value: bytes | None) -> str | bytes | None:
    """Decodes bytes if they are UTF-8."""
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _dictionary(array: pa.Array, text: _TextCounter) -> list[Any]:
    """Converts a dictionary-encoded array."""
    missing = array.indices.is_null().to_numpy(zero_copy_only=False)
    numbers = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
    used, places = np.unique(numbers[~missing], return_inverse=True)
    values = _values(array.dictionary.take(pa.array(used)), text.fresh())
    sizes = [len(value) if isinstance(value, str | bytes) else 0 for value in values]
    text.add(int(np.array(sizes, np.int64)[places].sum()))
    places = iter(places.tolist())
    return [None if absent else values[next(places)] for absent in missing.tolist()]


def _lists(array: pa.Array, text: _TextCounter) -> list[Any]:
    lengths = pc.list_value_length(array).to_pylist()
    values = iter(_values(array.flatten(), text))
    return [None if length is None else [next(values) for _ in range(length)] for length in lengths]


def _maps(array: pa.MapArray, text: _TextCounter) -> list[Any]:
    """Converts maps to dicts if their keys are strings, else to lists of pairs."""
    offsets = array.offsets.to_numpy()
    length = offsets[-1] - offsets[0]
    keys = _values(array.keys.slice(offsets[0], length), text)
    values = _values(array.items.slice(offsets[0], length), text)
    pairs = list(zip(keys, values, strict=True))
    missing = array.is_null().to_numpy(zero_copy_only=False)
    return [
        None if absent else _mapping(pairs[start:stop])
        for absent, start, stop in zip(
            missing, offsets[:-1] - offsets[0], offsets[1:] - offsets[0], strict=True
        )
    ]


def _mapping(pairs: list[tuple[Any, Any]]) -> Any:
    if not all(isinstance(key, str) for key, _ in pairs):
        return [[key, value] for key, value in pairs]
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("a map has a duplicate key")
    return mapping


def _structs(array: pa.Array, text: _TextCounter) -> list[Any]:
    names = [field.name for field in array.type]
    if len(set(names)) < len(names):
        raise ValueError("a struct has a duplicate field")
    missing = array.is_null().to_numpy(zero_copy_only=False).tolist()
    columns = [_values(column, text) for column in array.flatten()]
    rows = zip(*columns, strict=True) if columns else ((),) * len(array)
    return [
        None if absent else dict(zip(names, row, strict=True))
        for absent, row in zip(missing, rows, strict=True)
    ]


def _times(array: pa.Array) -> list[Any]:
    """Converts dates and times to ISO 8601 strings, durations to counts of their unit."""
    kind = array.type
    missing = array.is_null().to_numpy(zero_copy_only=False)
    width = pa.int32() if kind.bit_width == 32 else pa.int64()
    counts = array.view(width).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    if pa.types.is_duration(kind):
        texts: list[Any] = counts.tolist()
    elif pa.types.is_date32(kind):
        texts = _iso(counts, "D")
    elif pa.types.is_date64(kind):
        texts = _iso(counts // 86_400_000, "D")
    elif pa.types.is_timestamp(kind):
        zone = "" if kind.tz is None else "Z"
        texts = [moment and f"{moment}{zone}" for moment in _iso(counts, kind.unit)]
    else:
        day = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit] * 86_400
        if not ((counts >= 0) & (counts < day)).all():
            raise ValueError("a time of day out of range")
        texts = [moment and moment.partition("T")[2] for moment in _iso(counts, kind.unit)]
    return [None if absent else moment for absent, moment in zip(missing, texts, strict=True)]


def _iso(counts: np.ndarray, unit: str) -> list[str | None]:
    texts = np.datetime_as_string(counts.view(f"datetime64[{unit}]")).tolist()
    return [None if text == "NaT" else _trimmed(text) for text in texts]


def _trimmed(moment: str) -> str:
    """Removes trailing zeros from a fraction of a second."""
    return moment.rstrip("0").rstrip(".") if "." in moment else moment
