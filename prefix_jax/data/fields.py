"""What the fields of a labelled record hold, checked; errors name the record and the field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prefix_jax.config import TaskConfig
from prefix_jax.data.source import Record
from prefix_jax.data.template import check_unicode
from prefix_jax.errors import DataError


def collect_labels(records: Sequence[Record], task: TaskConfig) -> tuple[str, ...]:
    """The names of the labels that records hold, sorted: numbers by size, texts by letter.

    Raises:
        DataError: there is one label alone; or a record has none.
    """
    found: set[Any] = set()
    for record in records:
        value = record.value(task.label)
        for label in list_of(record, task.label) if task.name == "tag" else [value]:
            if not isinstance(label, str | int | float):
                raise DataError(
                    f"{record.source}: field {task.label!r} holds a {type(label).__name__} where "
                    "a label is a text or a number"
                )
            found.add(label)
    numbers = all(isinstance(value, int) for value in found)
    names = tuple(map(str, sorted(found, key=None if numbers else str)))
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
    texts = [str(word) for word in words]
    check_unicode(texts, record.source)
    return texts


def number_of(record: Record, name: str) -> float:
    """A finite number."""
    value = record.value(name)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{record.source}: field {name!r} holds {value!r}, not a number") from None
    except OverflowError:
        number = math.inf
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise DataError(f"{record.source}: field {name!r} holds {value!r}, which is not finite")
    return number


def label_of(record: Record, value: Any, names: Sequence[str], what: str = "label") -> int:
    """The number of a label: by its name, or counted from 0."""
    if str(value) in names:
        return list(names).index(str(value))
    if isinstance(value, int) and 0 <= value < len(names):
        return value
    raise DataError(
        f"{record.source}: the {what} {value!r} is none of {', '.join(map(repr, names))}; "
        + ("those are counted from 0" if what == "choice" else "name all of them in task.labels")
    )


def answers_of(record: Record, name: str, context: str) -> list[tuple[str, int]]:
    """The texts of the answers, and where each starts, in characters of the context."""
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
        if not isinstance(text, str) or not isinstance(start, int):
            raise DataError(f"{record.source}: an answer needs a text and an answer_start")
        if context[start : start + len(text)] != text:
            raise DataError(
                f"{record.source}: the text at character {start} is "
                f"{context[start : start + len(text)]!r}, not the answer {text!r}; offsets count "
                "characters of data.pair as it is rendered"
            )
    return pairs
