"""Mixtures: several datasets that train together, each with a prefix of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from prefix_jax.data.source import Record, listed, nearest, shown
from prefix_jax.errors import DataError
from prefix_jax.untrusted.names import check_storable_names


def collect_datasets(records: Iterable[Record], field: str) -> tuple[str, ...]:
    """Collects the names of the datasets in a field of the records, sorted.

    Raises:
        DataError: a record names no dataset, or its name cannot be used as a directory name.
    """
    names: set[str] = set()
    for record in records:
        name = _name(record, field)
        if name not in names:
            check_storable_names((name,), f"{record.origin}: field {field!r}", DataError)
            names.add(name)
    return tuple(sorted(names))


def assign_datasets(records: Iterable[Record], field: str, names: Sequence[str]) -> list[Record]:
    """Sets each record's dataset to the index of its name in `names`.

    Raises:
        DataError: a record names no dataset, or an unknown one.
    """
    indices = {name: index for index, name in enumerate(names)}
    assigned = []
    for record in records:
        name = _name(record, field)
        if name not in indices:
            near = nearest(name, names)
            hint = "" if near is None else f" did you mean {near!r}?"
            raise DataError(
                f"{record.origin}: unknown dataset {shown(name)} in field {field!r};{hint} the "
                f"datasets from method.datasets or else the training data are {listed(names)}"
            )
        assigned.append(dataclasses.replace(record, dataset=indices[name]))
    return assigned


def select_dataset(records: Iterable[Record], field: str, name: str) -> list[Record]:
    """Selects the records of one dataset: those that name it in a field, or lack the field.

    Raises:
        DataError: there are no such records.
    """
    selected = [record for record in records if str(record.fields.get(field, name)) == name]
    if not selected:
        raise DataError(
            f"no record has the dataset {name!r} in field {field!r}, which this prefix was trained "
            "for; give records of this dataset, or leave the field out"
        )
    return selected


def _name(record: Record, field: str) -> str:
    name = record.value(field)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise DataError(
            f"{record.origin}: field {field!r} must be the name of a dataset, got {shown(name)}"
        )
    return str(name)
