"""Validates the fields of labelled records; errors name the record and the field."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prefix_jax.config import TaskConfig
from prefix_jax.data.source import Record, listed, nearest, shown
from prefix_jax.errors import DataError
from prefix_jax.untrusted.names import check_storable_labels

_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?", re.ASCII)


class LabelIndex:
    """Maps the labels in records to class indices.

    A text is the name of a label. If any label name is a number ("1"), a number is a name too;
    otherwise it is an index from 0. A boolean is the label "true" or "false". The number 1.0 equals
    1. How one record is read never depends on the other records.

    Args:
        names: the label names, in order.
        what: the noun for messages, "label" or "choice".
    """

    def __init__(self, names: Sequence[str], what: str = "label"):
        self._numbers = {name: number for number, name in enumerate(names)}
        self._counted = not any(map(_NUMBER.fullmatch, names))
        self._what = what

    def number(self, record: Record, field: str, value: Any) -> int:
        """Returns the class index of a label.

        Args:
            record: the label's record, for messages.
            field: the label's field, for messages.
            value: the label.

        Raises:
            DataError: the value is not a label, or an unknown one.
        """
        name = label_name(record, field, value)
        # Prefixes stored by earlier versions spell True and 1.0 as Python does.
        for spelling in (name, str(value)):
            if spelling in self._numbers:
                return self._numbers[spelling]
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
        inside = whole and 0 <= value < len(self._numbers)
        if inside and self._counted:
            return int(value)
        near = nearest(name, self._numbers)
        if self._what == "choice":
            advice = "choices are counted from 0"
        elif inside:
            advice = (
                "when label names are numbers, a number is a name, not an index; list the names in "
                "task.labels exactly as in the data"
            )
        elif isinstance(value, bool):
            advice = "list booleans in task.labels as 'true' and 'false', in quotes"
        elif near is not None:
            advice = f"did you mean {near!r}?"
        else:
            advice = "list every label in task.labels"
        raise DataError(
            f"{record.source}: the {self._what} {shown(value)} in field {field!r} is not one of "
            f"{listed(self._numbers)}; {advice}"
        )


def label_name(record: Record, field: str, value: Any) -> str:
    """Returns the name of a label: the text, the digits of a number, or "true" or "false".

    The number 1.0 has the name "1".

    Raises:
        DataError: the value is not a text, a number or a boolean.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value) if value.is_integer() else value)
    if isinstance(value, str) and not value.strip():
        raise DataError(
            f"{record.source}: field {field!r} is {value!r}, expected a label; fill it in or "
            "remove the record"
        )
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, float):
        raise DataError(f"{record.source}: field {field!r} is {value}, expected a label")
    raise DataError(
        f"{record.source}: field {field!r} must be a label (text, number or boolean), got "
        f"{type(value).__name__}"
    )


def collect_labels(records: Sequence[Record], task: TaskConfig) -> tuple[str, ...]:
    """Collects the distinct label names, sorted: numbers by value, texts alphabetically.

    Raises:
        DataError: there is only one label; a record has no label, or one that cannot be stored; or
            some labels are booleans and others are not.
    """
    found: dict[str, Any] = {}
    first: dict[bool, Record] = {}  # the first record with a boolean, and with another label
    for record in records:
        value = record.value(task.label)
        for label in list_of(record, task.label) if task.name == "tag" else [value]:
            name = label_name(record, task.label, label)
            first.setdefault(isinstance(label, bool), record)
            if len(first) == 2:
                raise DataError(
                    f"{record.source}: field {task.label!r} is {shown(label)}, but in "
                    f"{first[not isinstance(label, bool)].source} it is "
                    f"{'not a boolean' if isinstance(label, bool) else 'a boolean'}; "
                    "use booleans in every record or in none"
                )
            if name not in found:
                check_storable_labels((name,), record.source, DataError)
                found[name] = label
    numbers = all(isinstance(label, int | float) for label in found.values())
    names = tuple(sorted(found, key=found.__getitem__ if numbers else None))
    if len(names) < 2:
        raise DataError(
            f"the training data has only one label, {names[0]!r}, in field {task.label!r}; "
            "at least two are needed"
        )
    return names


def list_of(record: Record, name: str) -> list[Any]:
    """Returns the items of a field that holds a non-empty list."""
    value = record.value(name)
    if not isinstance(value, list):
        raise DataError(
            f"{record.source}: field {name!r} must be a list with one item per word, got "
            f"{type(value).__name__}"
        )
    if not value:
        raise DataError(f"{record.source}: field {name!r} is an empty list; remove the record")
    return value


def words_of(record: Record, name: str) -> list[str]:
    """Returns the words of a field as texts."""
    words = list_of(record, name)
    for word in words:
        if not isinstance(word, str | int | float):
            raise DataError(
                f"{record.source}: words in field {name!r} must be texts or numbers, got "
                f"{type(word).__name__}"
            )
        if word != word:
            raise DataError(f"{record.source}: field {name!r} contains NaN, expected a word")
    return [str(word) for word in words]


def number_of(record: Record, name: str) -> float:
    """Returns the value of a field as a number that is finite in float32."""
    value = record.value(name)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    except OverflowError:
        number = math.inf
    if number != number:
        raise DataError(f"{record.source}: field {name!r} must be a number, got {shown(value)}")
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise DataError(
            f"{record.source}: field {name!r} must be finite in float32, got {shown(value)}"
        )
    return number


def answers_of(record: Record, name: str, context: str) -> list[tuple[str, int]]:
    """Returns the answers as pairs of text and start, in characters of the context.

    A question without an answer has an empty list, or one empty answer.
    """
    value = record.value(name)
    if isinstance(value, Mapping) and all(
        isinstance(value.get(key, []), list) for key in ("text", "answer_start")
    ):
        texts, starts = value.get("text", []), value.get("answer_start", [])
        if len(texts) != len(starts):
            raise DataError(
                f"{record.source}: field {name!r} has {len(texts)} text and {len(starts)} "
                "answer_start entries; every answer needs both"
            )
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        pairs = [(item.get("text"), item.get("answer_start")) for item in value]
    else:
        raise DataError(
            f"{record.source}: field {name!r} must have answers in SQuAD's format, "
            '{"text": […], "answer_start": […]}'
        )
    for text, start in pairs:
        if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
            raise DataError(f"{record.source}: every answer needs a text and an answer_start")
        if not text:
            if len(pairs) > 1:
                raise DataError(f"{record.source}: one of {len(pairs)} answers is empty")
            return []
        if start < 0 or context[start : start + len(text)] != text:
            there = context[start : start + len(text)] if start >= 0 else ""
            raise DataError(
                f"{record.source}: expected the answer {shown(text)} at character {start}, got "
                f"{shown(there)}; offsets count characters of the rendered data.pair from 0"
            )
    return pairs
