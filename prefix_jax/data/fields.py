"""What the fields of a labelled record hold, checked; errors name the record and the field."""

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
    """Turns labels, as records hold them, into their numbers.

    A text is the name of a label. So is a number if any name is a number ("1"); otherwise it
    counts the labels from 0. A boolean is the label "true" or "false". The number 1.0 is the same
    as 1. How a record is read never depends on the other records.

    Args:
        names: of the labels, in order.
        what: the word for messages, "label" or "choice".
    """

    def __init__(self, names: Sequence[str], what: str = "label"):
        self._numbers = {name: number for number, name in enumerate(names)}
        self._counted = not any(map(_NUMBER.fullmatch, names))
        self._what = what

    def number(self, record: Record, field: str, value: Any) -> int:
        """The number of a label.

        Args:
            record: where it is from, for messages.
            field: the field that holds it, for messages.
            value: the label.

        Raises:
            DataError: it is unknown, or not a label.
        """
        name = label_name(record, field, value)
        # Prefixes that were stored by earlier versions spell True and 1.0 as Python does.
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
                "labels with numbers as names are not counted from 0: name them in task.labels as "
                "the data does"
            )
        elif isinstance(value, bool):
            advice = "name booleans in task.labels as true and false, in quotes"
        elif near is not None:
            advice = f"did you mean {near!r}?"
        else:
            advice = "name all of them in task.labels"
        raise DataError(
            f"{record.source}: the {self._what} {shown(value)} in field {field!r} is not one of "
            f"{listed(self._numbers)}; {advice}"
        )


def label_name(record: Record, field: str, value: Any) -> str:
    """The name of a label: a text; the digits of a number, 1.0 being 1; "true" or "false".

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value) if value.is_integer() else value)
    if isinstance(value, str) and not value.strip():
        raise DataError(
            f"{record.source}: field {field!r} holds {value!r} where a label is expected; fill it "
            "in or remove the record"
        )
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, float):
        raise DataError(f"{record.source}: field {field!r} holds {value}, which is not a label")
    raise DataError(
        f"{record.source}: field {field!r} holds a {type(value).__name__} where a label is a text "
        "or a number"
    )


def collect_labels(records: Sequence[Record], task: TaskConfig) -> tuple[str, ...]:
    """The names of the labels that records hold, sorted: numbers by size, texts by letter.

    Raises:
        DataError: there is only one label; a record has none, or one that cannot be stored; or
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
                    f"{record.source}: field {task.label!r} holds {shown(label)}, but "
                    f"{first[not isinstance(label, bool)].source} holds "
                    f"{'another kind of label' if isinstance(label, bool) else 'a boolean'}; "
                    "write true and false in every record or in none"
                )
            if name not in found:
                check_storable_labels((name,), record.source, DataError)
                found[name] = label
    numbers = all(isinstance(label, int | float) for label in found.values())
    names = tuple(sorted(found, key=found.__getitem__ if numbers else None))
    if len(names) < 2:
        raise DataError(
            f"the training data holds one label, {names[0]!r}, in the field {task.label!r}; "
            "there must be two at least"
        )
    return names


def list_of(record: Record, name: str) -> list[Any]:
    """The items of a field, of which there is one at least."""
    value = record.value(name)
    if not isinstance(value, list):
        raise DataError(f"{record.source}: field {name!r} must hold a list, one item a word")
    if not value:
        raise DataError(f"{record.source}: field {name!r} holds an empty list; remove the record")
    return value


def words_of(record: Record, name: str) -> list[str]:
    """The words of a field, as texts."""
    words = list_of(record, name)
    for word in words:
        if not isinstance(word, str | int | float):
            raise DataError(
                f"{record.source}: field {name!r} holds a {type(word).__name__} where a word is "
                "a text or a number"
            )
        if word != word:
            raise DataError(f"{record.source}: field {name!r} holds NaN where a word should be")
    return [str(word) for word in words]


def number_of(record: Record, name: str) -> float:
    """A finite number."""
    value = record.value(name)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    except OverflowError:
        number = math.inf
    if number != number:
        raise DataError(f"{record.source}: field {name!r} holds {shown(value)}, not a number")
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise DataError(
            f"{record.source}: field {name!r} holds {shown(value)}, which is not finite in float32"
        )
    return number


def answers_of(record: Record, name: str, context: str) -> list[tuple[str, int]]:
    """The texts of the answers, and where each starts, in characters of the context.

    A question without an answer has an empty list, or one answer without text.
    """
    value = record.value(name)
    if isinstance(value, Mapping) and all(
        isinstance(value.get(key, []), list) for key in ("text", "answer_start")
    ):
        texts, starts = value.get("text", []), value.get("answer_start", [])
        if len(texts) != len(starts):
            raise DataError(
                f"{record.source}: field {name!r} has {len(texts)} texts and {len(starts)} "
                "answer_starts; each answer needs both"
            )
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        pairs = [(item.get("text"), item.get("answer_start")) for item in value]
    else:
        raise DataError(
            f"{record.source}: field {name!r} must hold answers as SQuAD does: "
            '{"text": […], "answer_start": […]}'
        )
    for text, start in pairs:
        if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
            raise DataError(f"{record.source}: an answer needs a text and an answer_start")
        if not text:
            if len(pairs) > 1:
                raise DataError(f"{record.source}: one of {len(pairs)} answers is empty")
            return []
        if start < 0 or context[start : start + len(text)] != text:
            there = context[start : start + len(text)] if start >= 0 else ""
            raise DataError(
                f"{record.source}: the text at character {start} is {shown(there)}, not the answer "
                f"{shown(text)}; offsets count characters of data.pair as it is rendered, from 0"
            )
    return pairs
