"""Which of several tasks a record is of, where they train together."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence

from prefix_jax.data.source import Record
from prefix_jax.errors import DataError


def collect_tasks(records: Iterable[Record], field: str) -> tuple[str, ...]:
    """The tasks that records name in a field, sorted.

    Raises:
        DataError: a record names none.
    """
    return tuple(sorted({_name(record, field) for record in records}))


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
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"{record.source}: the task {name!r} in field {field!r} is unknown;{hint} there "
                f"are {', '.join(names)}, of method.tasks or else of the training examples"
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
    if not isinstance(name, str | int):
        raise DataError(
            f"{record.source}: field {field!r} holds a {type(name).__name__} and no name of a task"
        )
    return str(name)
