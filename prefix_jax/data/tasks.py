"""Which of several tasks a record is of, where they train together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from prefix_jax.data.source import Record, listed, nearest, shown
from prefix_jax.errors import DataError
from prefix_jax.untrusted.names import check_storable_names


def collect_tasks(records: Iterable[Record], field: str) -> tuple[str, ...]:
    """The tasks that records name in a field, sorted.

    Raises:
        DataError: a record names none, or one that cannot name a directory for its prefix.
    """
    names: set[str] = set()
    for record in records:
        name = _name(record, field)
        if name not in names:
            check_storable_names((name,), f"{record.source}: field {field!r}", DataError)
            names.add(name)
    return tuple(sorted(names))


def with_tasks(records: Iterable[Record], field: str, names: Sequence[str]) -> list[Record]:
    """The records with the number of the task that each names, its place in `names`.

    Raises:
        DataError: a record names none, or an unknown one.
    """
    numbers = {name: number for number, name in enumerate(names)}
    found = []
    for record in records:
        name = _name(record, field)
        if name not in numbers:
            near = nearest(name, names)
            hint = "" if near is None else f" did you mean {near!r}?"
            raise DataError(
                f"{record.source}: the task {shown(name)} in field {field!r} is unknown;{hint} "
                f"there are {listed(names)}, of method.tasks or else of the training examples"
            )
        found.append(dataclasses.replace(record, task=numbers[name]))
    return found


def of_task(records: Iterable[Record], field: str, name: str) -> list[Record]:
    """The records of one task: those that name it in a field, or have no such field.

    Raises:
        DataError: there is none.
    """
    found = [record for record in records if str(record.fields.get(field, name)) == name]
    if not found:
        raise DataError(
            f"no record is of the task {name!r}, which the prefix is for: field {field!r} of all "
            "names another"
        )
    return found


def _name(record: Record, field: str) -> str:
    name = record.value(field)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise DataError(
            f"{record.source}: field {field!r} holds {shown(name)}, not the name of a task"
        )
    return str(name)
