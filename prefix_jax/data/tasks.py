"""Multitask training: assigns records to tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from prefix_jax.data.source import Record, listed, nearest, shown
from prefix_jax.errors import DataError
from prefix_jax.untrusted.names import check_storable_names


def collect_tasks(records: Iterable[Record], field: str) -> tuple[str, ...]:
    """Collects the task names in a field of the records, sorted.

    Raises:
        DataError: a record has no task, or its name cannot be used as a directory name.
    """
    names: set[str] = set()
    for record in records:
        name = _name(record, field)
        if name not in names:
            check_storable_names((name,), f"{record.source}: field {field!r}", DataError)
            names.add(name)
    return tuple(sorted(names))


def with_tasks(records: Iterable[Record], field: str, names: Sequence[str]) -> list[Record]:
    """Sets each record's task to the index of its task name in `names`.

    Raises:
        DataError: a record has no task, or an unknown one.
    """
    numbers = {name: number for number, name in enumerate(names)}
    found = []
    for record in records:
        name = _name(record, field)
        if name not in numbers:
            near = nearest(name, names)
            hint = "" if near is None else f" did you mean {near!r}?"
            raise DataError(
                f"{record.source}: unknown task {shown(name)} in field {field!r};{hint} the tasks "
                f"from method.tasks or else the training data are {listed(names)}"
            )
        found.append(dataclasses.replace(record, task=numbers[name]))
    return found


def of_task(records: Iterable[Record], field: str, name: str) -> list[Record]:
    """Selects the records of one task: those that name it in a field, or lack the field.

    Raises:
        DataError: there are no such records.
    """
    found = [record for record in records if str(record.fields.get(field, name)) == name]
    if not found:
        raise DataError(
            f"no record has the task {name!r} in field {field!r}, which this prefix was trained "
            "for; give records of this task, or leave the field out"
        )
    return found


def _name(record: Record, field: str) -> str:
    name = record.value(field)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise DataError(
            f"{record.source}: field {field!r} must be the name of a task, got {shown(name)}"
        )
    return str(name)
