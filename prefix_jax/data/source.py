"""Reads records from JSONL, CSV, Parquet, TensorFlow Datasets or Python iterables.

Files are read whole: training data fits in memory as tokens, and every error in a file is reported
before the first step. The file readers are in `untrusted/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefix_jax.errors import DataError, PrefixJaxError, reason
from prefix_jax.untrusted.csv import read_csv
from prefix_jax.untrusted.jsonl import read_jsonl
from prefix_jax.untrusted.lines import check_text
from prefix_jax.untrusted.parquet import read_parquet
from prefix_jax.untrusted.paths import expand

TFDS = "tfds:"
# "huggingface:NAME", but not "glue:2.0.0".
_NAMESPACE = re.compile(r"\w+:(?![\d*])")
_URL = re.compile(r"\w+://")
# Number of names searched for the closest match.
_MOST_NAMES = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """The fields of one record.

    Attributes:
        fields: name → value.
        origin: where the record comes from, for messages: "train.jsonl:17".
        dataset: the index of its dataset in a mixture, from 0; None without a mixture. See
            `mixture`.
    """

    fields: Mapping[str, Any]
    origin: str
    dataset: int | None = None

    def value(self, name: str) -> Any:
        """Returns the value of a field.

        Raises:
            DataError: there is no such field, or its value is null or NaN.
        """
        if name not in self.fields:
            raise DataError(
                f"{self.origin}: no field {name!r}{_nearest(name, self.fields)}; "
                f"the fields are {listed(self.fields)}"
            )
        value = self.fields[name]
        if value is None or (isinstance(value, float) and value != value):
            raise DataError(
                f"{self.origin}: field {name!r} is {'missing' if value is None else 'NaN'}; "
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
            a TensorFlow dataset prepared as array_record; or an iterable of mappings or `Record`s.
        tfds_dir: the data directory of TensorFlow Datasets; None uses its default.

    Raises:
        DataError: the source is missing, malformed, empty, or of an unknown type.
    """
    if isinstance(spec, str) and spec.startswith(TFDS):
        name, records = spec, _read_tfds(spec, tfds_dir)
    elif isinstance(spec, str) and _URL.match(spec):
        raise DataError(
            f"{spec}: records are read from local files only; download the file (gcloud storage cp "
            f"for gs://, curl -LO for http://) and give its path, or give {TFDS}NAME/SPLIT"
        )
    elif isinstance(spec, str | os.PathLike):
        name, records = os.fspath(spec), _read_file(expand(spec, DataError))
    elif isinstance(spec, Iterable):
        name, records = "the records", _read_mappings(spec)
    else:
        raise DataError(f"expected a file or an iterable of mappings as records, got {shown(spec)}")
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
            raise DataError(f"record {number} must be a mapping, got {type(fields).__name__}")
        records.append(_record(fields, f"record {number}"))
    return records


def _record(fields: Mapping[Any, Any], origin: str) -> Record:
    """Converts a library's values to a record like one from a file."""
    try:
        plain = _plain(fields)
    except RecursionError:
        raise DataError(f"{origin}: values are nested too deeply; flatten them") from None
    check_text(plain, origin, DataError)
    return Record(plain, origin)


def _read_file(path: Path) -> list[Record]:
    if path.suffix not in READERS:
        raise DataError(
            f"{path}: unknown file type {path.suffix!r}; give a file that ends in "
            f"{', '.join(READERS)}, or {TFDS}NAME/SPLIT"
        )
    if path.is_dir():
        raise DataError(f"{path} is a directory; give a file")
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path}: a broken link to {path.readlink()}")
    if not path.exists():
        where = "" if path.parent.is_dir() else f"; there is no directory {path.parent}"
        raise DataError(f"{path}: no such file{_nearest(path.name, _siblings(path))}{where}")
    # Predictions contain the name of this file.
    check_text(path.name, f"the file name {path.name!a}", DataError)
    rows = READERS[path.suffix](path, DataError)
    return [Record(fields, f"{path.name}:{number}") for number, fields in rows]


def _siblings(path: Path) -> list[str]:
    try:
        return [entry.name for entry in itertools.islice(path.parent.iterdir(), _MOST_NAMES)]
    except OSError:
        return []


Rows = Iterator[tuple[int, dict[str, Any]]]


def _read_csv(path: Path, error: type[PrefixJaxError]) -> Rows:
    """Reads CSV rows. Empty cells and "nan", a missing value in numeric libraries, become None."""
    for number, fields in read_csv(path, error):
        yield (
            number,
            {name: None if cell.lower() in ("", "nan") else cell for name, cell in fields.items()},
        )


READERS: dict[str, Callable[[Path, type[PrefixJaxError]], Rows]] = {
    ".jsonl": read_jsonl,
    ".csv": _read_csv,
    ".parquet": read_parquet,
}


def _read_tfds(spec: str, data_dir: str | os.PathLike[str] | None) -> list[Record]:
    # A local import, because it takes seconds.
    import tensorflow_datasets as tfds

    name, _, split = spec.removeprefix(TFDS).rpartition("/")
    if not name or not split:
        raise DataError(f"{spec}: write {TFDS}NAME/SPLIT, such as {TFDS}e2e_cleaned/train")
    if _NAMESPACE.match(name):
        raise DataError(
            f"{spec}: datasets of other namespaces, such as huggingface:NAME, can run their own "
            "code and are not supported; export the dataset to a .parquet file"
        )
    try:
        with _importing_no_features(tfds.features.FeatureConnector):
            try:
                rows = tfds.data_source(
                    name, split=split, data_dir=data_dir, download=False, try_gcs=False
                )
            except ModuleNotFoundError:
                # The code of some datasets (SuperGLUE) needs TensorFlow; the prepared files do not.
                prepared = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
                rows = prepared.as_data_source(split=split)
        return [_record(row, f"{spec}:{number}") for number, row in enumerate(rows)]
    except DataError:
        raise
    except Exception as error:  # damaged files raise many types of errors in several libraries
        # Without h5py, registration stops halfway and many text datasets are not found.
        missing = "" if importlib.util.find_spec("h5py") else "; install h5py, and try again"
        raise DataError(
            f"{spec}: cannot be read from {data_dir or 'the default data directory'}: "
            # The rest of the message may list every dataset.
            f"{reason(error)}; "
            "prepare it first, with download_and_prepare(file_format='array_record')" + missing
        ) from error


@contextlib.contextmanager
def _importing_no_features(connector: Any) -> Iterator[None]:
    """Keeps TFDS from importing arbitrary modules named in features.json."""
    original = connector.__dict__["cls_from_name"]

    def find(cls: Any, name: str) -> Any:
        if not str(name).startswith("tensorflow_datasets."):
            raise ValueError(f"features.json names {shown(name)}, which is not a TFDS feature")
        return original.__func__(cls, name)

    connector.cls_from_name = classmethod(find)
    try:
        yield
    finally:
        connector.cls_from_name = original


def _plain(value: Any) -> Any:
    """Converts numpy values to Python values, and UTF-8 bytes to str (other bytes stay bytes)."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, np.longdouble):  # its tolist() returns itself
        return float(value)
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def listed(names: Iterable[Any], most: int = 20) -> str:
    """Formats the first names, quoted, for a message."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more or "(none)"


def shown(value: Any, most: int = 80) -> str:
    """Formats a value for a message, shortened if it is long."""
    try:
        text = repr(value)
    except ValueError:  # a number with thousands of digits
        text = f"{type(value).__name__} with thousands of digits"
    return text if len(text) <= most else f"{text[:most]}…"


def nearest(name: str, names: Iterable[Any]) -> str | None:
    """Returns the closest match for an unknown name, if there is one."""
    short = [text for text in map(str, itertools.islice(names, _MOST_NAMES)) if len(text) <= 100]
    return next(iter(difflib.get_close_matches(name[:100], short, n=1)), None)


def _nearest(name: str, names: Iterable[Any]) -> str:
    close = nearest(name, names)
    return "" if close is None else f" (did you mean {close!r}?)"
