"""Records and where they came from: JSONL, CSV, Parquet, TensorFlow Datasets or Python.

A file is read whole: what trains here fits in memory as tokens, and every error of a file shows
before the first step.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from prefix_jax.errors import DataError, reason

TFDS = "tfds:"


@dataclasses.dataclass(frozen=True)
class Record:
    """The fields of one record.

    Attributes:
        fields: name → value.
        source: where the record came from, for messages: "train.jsonl:17".
        task: which of several tasks it is of, from 0; None where there is one. See `tasks`.
    """

    fields: Mapping[str, Any]
    source: str
    task: int | None = None

    def value(self, name: str) -> Any:
        """The value of a field.

        Raises:
            DataError: there is no such field, or it is null or NaN.
        """
        if name not in self.fields:
            raise DataError(
                f"{self.source}: no field {name!r}{_nearest(name, self.fields)}; "
                f"the fields are {', '.join(map(repr, self.fields)) or '(none)'}"
            )
        value = self.fields[name]
        if value is None or (isinstance(value, float) and value != value):
            raise DataError(
                f"{self.source}: field {name!r} is {'missing' if value is None else 'NaN'}; "
                "fill it in or remove the record"
            )
        return value


def read_records(
    spec: str | os.PathLike[str] | Iterable[Mapping[str, Any] | Record],
    *,
    tfds_dir: str | os.PathLike[str] | None = None,
) -> Sequence[Record]:
    """Reads every record of a source.

    Args:
        spec: a .jsonl, .csv or .parquet file; `tfds:NAME/SPLIT` (`tfds:glue/sst2/train[:10%]`) for
            a TensorFlow dataset that was prepared as array_record; or an iterable of mappings, or
            of records that were read before.
        tfds_dir: the data directory of TensorFlow Datasets; None takes its default.

    Raises:
        DataError: the source is missing, of an unknown kind, malformed or empty.
    """
    if isinstance(spec, str) and spec.startswith(TFDS):
        name, records = spec, _read_tfds(spec, tfds_dir)
    elif isinstance(spec, str | os.PathLike):
        path = Path(spec)
        name, records = str(path), _read_file(path)
    elif isinstance(spec, Iterable):
        name, records = "the records", _read_mappings(spec)
    else:
        raise DataError(f"the records are {spec!r:.80}; give a file, or an iterable of mappings")
    if not records:
        raise DataError(f"{name}: no records; at least one is needed")
    return records


def _read_mappings(mappings: Iterable[Mapping[str, Any] | Record]) -> list[Record]:
    records = []
    for number, fields in enumerate(mappings, 1):
        if isinstance(fields, Record):
            records.append(fields)
            continue
        if not isinstance(fields, Mapping):
            raise DataError(f"record {number} is a {type(fields).__name__}; it must be a mapping")
        records.append(Record(_plain(fields), f"record {number}"))
    return records


def _read_file(path: Path) -> list[Record]:
    if path.suffix not in READERS:
        raise DataError(
            f"{path}: unknown kind of data {path.suffix!r}; give a file that ends in "
            f"{', '.join(READERS)}, or {TFDS}NAME/SPLIT"
        )
    if path.is_dir():
        raise DataError(f"{path} is a directory; give one of the files in it")
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        where = "" if path.parent.is_dir() else f"; there is no directory {path.parent}"
        raise DataError(f"{path}: no such file{_nearest(path.name, siblings)}{where}")
    try:
        return list(READERS[path.suffix](path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            source = f"{path.name}:{number}"
            try:
                fields = json.loads(line, object_pairs_hook=_unique)
            except _TwiceError as error:
                raise DataError(f"{path}:{number}: the field {error} stands twice") from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: malformed JSON, {error.msg} at column {error.colno}"
                ) from error
            # A number of thousands of digits, lists in lists without end.
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}:{number}: JSON that Python cannot read, {error}"
                ) from error
            if not isinstance(fields, dict):
                raise DataError(
                    f"{path}:{number}: a {type(fields).__name__}; "
                    "each line must hold one JSON object"
                )
            yield Record(fields, source)


class _TwiceError(Exception):
    """A key of a JSON object that stands there twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What JSON's reader would make of an object, where it takes the last of equal keys."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(repr(next(name for name in names if names.count(name) > 1)))
    return fields


def _read_csv(path: Path) -> Iterator[Record]:
    """Cells that are empty or "nan", as numeric libraries write a missing value, become None."""
    # A cell may hold a whole document; Python's own limit is 128 KiB.
    limit = csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            names = next(rows, [])
            if len(set(names)) < len(names):
                raise DataError(f"{path}:1: the header names a column twice: {', '.join(names)}")
            start = rows.line_num + 1
            for row in rows:
                if row:
                    if len(row) != len(names):
                        raise DataError(
                            f"{path}:{start}: {len(row)} cells under {len(names)} columns; "
                            'put cells that hold commas into double quotes ("…")'
                        )
                    cells = [None if cell.lower() in ("", "nan") else cell for cell in row]
                    yield Record(dict(zip(names, cells, strict=True)), f"{path.name}:{start}")
                start = rows.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{rows.line_num}: malformed CSV, {error}") from error
        finally:
            csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    for number, fields in enumerate(rows, 1):
        yield Record(fields, f"{path.name}:{number}")


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_tfds(spec: str, data_dir: str | os.PathLike[str] | None) -> list[Record]:
    # Imported where it is used: it takes seconds.
    import tensorflow_datasets as tfds

    name, _, split = spec.removeprefix(TFDS).rpartition("/")
    if not name or not split:
        raise DataError(f"{spec}: write {TFDS}NAME/SPLIT, such as {TFDS}e2e_cleaned/train")
    try:
        try:
            rows = tfds.data_source(
                name, split=split, data_dir=data_dir, download=False, try_gcs=False
            )
        except ModuleNotFoundError:
            # The code of some sets (SuperGLUE) needs TensorFlow; what it prepared does not.
            prepared = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
            rows = prepared.as_data_source(split=split)
        return [Record(_plain(row), f"{spec}:{number}") for number, row in enumerate(rows)]
    # Of a set that is not there yet, a KeyError says so.
    except (ValueError, NotImplementedError, OSError, AssertionError, KeyError) as error:
        # Without h5py, registration stops halfway and many text datasets are not found.
        missing = "" if importlib.util.find_spec("h5py") else "; install h5py, and try again"
        raise DataError(
            f"{spec}: cannot be read from {data_dir or 'the default data directory'}: "
            # The rest of such a message may be a list of every dataset there is.
            f"{reason(error)}; "
            "prepare it first, with download_and_prepare(file_format='array_record')" + missing
        ) from error


def _plain(value: Any) -> Any:
    """Values of numpy as Python's, and text as str (bytes that are not text stay bytes)."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, map(str, names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
