"""Parquet, with bounds on the number of values and the amount of text that a file expands to."""

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
# A file of a few kB can expand to billions of values. What is allowed is the larger of a floor,
# which takes seconds to read, and a multiple of the file's size, which no table of texts reaches.
MIN_VALUES, VALUES_PER_BYTE = 5_000_000, 4
MIN_TEXT, TEXT_PER_BYTE = 2**30, 50
# Rows that are decoded at a time; fewer where repeated texts are decoded each time.
_BATCH, _SMALL_BATCH = 4096, 512


def read_parquet(
    path: str | os.PathLike[str], error: type[PrefixJaxError]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of a file as {column: value}, each with its number, counted from 1.

    Lists, structs and maps with text keys become Python's; numbers stay numbers. Dates, times and
    timestamps become ISO 8601 texts (with "Z" if they have a time zone, as they are stored in UTC),
    durations counts of their unit, decimals texts of their digits, and bytes texts if they are
    UTF-8. A column is read from the file only: folders such as "lang=en/" add none.

    Args:
        path: of the file.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if the file is missing, unreadable, malformed, names a
            column twice, holds a type without a value in Python, or expands to more than the
            limits of this module.
    """
    with open_binary(path, error) as (file, size):
        try:
            table = pq.ParquetFile(file)
            _check_sizes(table.metadata, size, str(path), error)
            names = list(table.schema_arrow.names)
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise error(f"{path}: names the column {twice[:60]!r} twice; rename one")
            shared, others = _texts(table)
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
        except Exception as failure:  # pyarrow raises every kind of error for malformed files
            raise error(f"{path}: not a readable Parquet file ({reason(failure)})") from failure


class _TextCounter:
    """The bytes of text that a file has expanded to so far."""

    def __init__(self, limit: int, path: str, error: type[PrefixJaxError]):
        self.limit = limit
        self.path = path
        self.error = error
        self.total = 0

    def add(self, size: int) -> None:
        """Counts bytes and raises the caller's error once the limit is exceeded."""
        self.total += size
        if self.total > self.limit:
            raise self.error(
                f"{self.path}: expands to more than {self.limit:,} bytes of text; leave columns "
                "out or split the file"
            )

    def fresh(self) -> _TextCounter:
        """A counter with the same limit that starts at 0."""
        return _TextCounter(self.limit, self.path, self.error)


def _batches(table: pq.ParquetFile, rows: int) -> Iterator[pa.RecordBatch]:
    # One row group at a time: dictionaries inside lists cannot be joined.
    for group in range(table.num_row_groups):
        yield from table.iter_batches(batch_size=rows, row_groups=[group])


def _texts(table: pq.ParquetFile) -> tuple[list[str], bool]:
    """The columns of which repeated texts are read once, and whether there are others with text.

    pyarrow cannot do this inside lists and structs, nor for pages that store differences of texts.
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
    """Raises `error` if a file expands to too much, as far as its footer says."""
    if metadata.num_columns > MAX_COLUMNS:
        raise error(f"{path}: {metadata.num_columns:,} columns; at most {MAX_COLUMNS:,} are read")
    values = data = 0
    most = max(MIN_VALUES, VALUES_PER_BYTE * size)
    for row_group in map(metadata.row_group, range(metadata.num_row_groups)):
        values += row_group.num_rows
        for column in range(metadata.num_columns):
            chunk = row_group.column(column)
            values += chunk.num_values
            width = max(metadata.schema.column(column).length, 0)  # of values of a fixed length
            data += max(chunk.total_uncompressed_size, width * chunk.num_values)
        if values > most:
            raise error(
                f"{path}: expands from {size:,} bytes to more than {most:,} values; leave columns "
                "out or split the file"
            )
        if data > (limit := max(MIN_TEXT, TEXT_PER_BYTE * size)):
            raise error(
                f"{path}: expands from {size:,} bytes to more than {limit:,}; leave columns out or "
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
    """The values of a column in a batch whose first row is number `before` + 1."""
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
    """The values of an array as Python's."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _values(array.storage, text)
    if pa.types.is_dictionary(kind):
        return _shared(array, text)
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
    except pa.ArrowException:  # a text that is not UTF-8, of which this says more
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
    """Bytes as text, if they are UTF-8."""
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _shared(array: pa.Array, text: _TextCounter) -> list[Any]:
    """The values of an array that numbers those of a dictionary."""
    missing = array.indices.is_null().to_numpy(zero_copy_only=False)
    numbers = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
    used, places = np.unique(numbers[~missing], return_inverse=True)
    values = _values(array.dictionary.take(pa.array(used)), text.fresh())
    sizes = [len(value) if isinstance(value, str | bytes) else 0 for value in values]
    text.add(int(np.array(sizes, np.int64)[places].sum()))
    found = iter(places.tolist())
    return [None if absent else values[next(found)] for absent in missing.tolist()]


def _lists(array: pa.Array, text: _TextCounter) -> list[Any]:
    lengths = pc.list_value_length(array).to_pylist()
    values = iter(_values(array.flatten(), text))
    return [None if length is None else [next(values) for _ in range(length)] for length in lengths]


def _maps(array: pa.MapArray, text: _TextCounter) -> list[Any]:
    """Maps as mappings if their keys are texts, else as lists of their pairs."""
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
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a map holds a key twice")
    return found


def _structs(array: pa.Array, text: _TextCounter) -> list[Any]:
    names = [field.name for field in array.type]
    if len(set(names)) < len(names):
        raise ValueError("a struct names a field twice")
    missing = array.is_null().to_numpy(zero_copy_only=False).tolist()
    columns = [_values(column, text) for column in array.flatten()]
    rows = zip(*columns, strict=True) if columns else ((),) * len(array)
    return [
        None if absent else dict(zip(names, row, strict=True))
        for absent, row in zip(missing, rows, strict=True)
    ]


def _times(array: pa.Array) -> list[Any]:
    """Points in time as ISO 8601 texts, of any year; durations as counts of their unit."""
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
            raise ValueError("a time outside the day")
        texts = [moment and moment.partition("T")[2] for moment in _iso(counts, kind.unit)]
    return [None if absent else moment for absent, moment in zip(missing, texts, strict=True)]


def _iso(counts: np.ndarray, unit: str) -> list[str | None]:
    texts = np.datetime_as_string(counts.view(f"datetime64[{unit}]")).tolist()
    return [None if text == "NaT" else _trimmed(text) for text in texts]


def _trimmed(moment: str) -> str:
    """Without zeros at the end of a fraction of a second."""
    return moment.rstrip("0").rstrip(".") if "." in moment else moment
