"""Label names and class indices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from prefix_jax.data.source import Record, listed, nearest, shown
from prefix_jax.errors import ConfigError, DataError
from prefix_jax.untrusted.names import check_storable_labels

_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?", re.ASCII)


class LabelEncoder:
    """Maps the labels in records to class indices.

    A text is the name of a label. If any label name is a number ("1"), a number is a name too;
    otherwise it is an index from 0. A boolean is the label "true" or "false". The number 1.0 equals
    1. How one record is read never depends on the other records.

    Args:
        names: the label names, in order.
        noun: what messages call a label: "label" or "choice".
    """

    def __init__(self, names: Sequence[str], noun: str = "label"):
        self._indices = {name: index for index, name in enumerate(names)}
        self._counted = not any(map(_NUMBER.fullmatch, names))
        self._noun = noun

    def index(self, record: Record, field: str, value: Any) -> int:
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
            if spelling in self._indices:
                return self._indices[spelling]
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
        inside = whole and 0 <= value < len(self._indices)
        if inside and self._counted:
            return int(value)
        near = nearest(name, self._indices)
        if self._noun == "choice":
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
            f"{record.origin}: the {self._noun} {shown(value)} in field {field!r} is not one of "
            f"{listed(self._indices)}; {advice}"
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
            f"{record.origin}: field {field!r} is {value!r}, expected a label; fill it in or "
            "remove the record"
        )
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, float):
        raise DataError(f"{record.origin}: field {field!r} is {value}, expected a label")
    raise DataError(
        f"{record.origin}: field {field!r} must be a label (text, number or boolean), got "
        f"{type(value).__name__}"
    )


def collect_labels(labels: Iterable[tuple[Record, Any]], field: str) -> tuple[str, ...]:
    """Collects the distinct label names, sorted: numbers by value, texts alphabetically.

    Args:
        labels: every label, with its record.
        field: the field of the labels, for messages.

    Raises:
        DataError: there is only one label; a record has no label, or one that cannot be stored; or
            some labels are booleans and others are not.
    """
    values: dict[str, Any] = {}
    first: dict[bool, Record] = {}  # the first record with a boolean, and with another label
    for record, label in labels:
        name = label_name(record, field, label)
        first.setdefault(isinstance(label, bool), record)
        if len(first) == 2:
            raise DataError(
                f"{record.origin}: field {field!r} is {shown(label)}, but in "
                f"{first[not isinstance(label, bool)].origin} it is "
                f"{'not a boolean' if isinstance(label, bool) else 'a boolean'}; "
                "use booleans in every record or in none"
            )
        if name not in values:
            check_storable_labels((name,), record.origin, DataError)
            values[name] = label
    numbers = all(isinstance(label, int | float) for label in values.values())
    names = tuple(sorted(values, key=values.__getitem__ if numbers else None))
    if len(names) < 2:
        raise DataError(
            f"the training data has only one label, {names[0]!r}, in field {field!r}; "
            "at least two are needed"
        )
    return names


def check_labels(names: Sequence[str] | None) -> None:
    """Raises ConfigError unless every label is listed once, and there are at least two."""
    if names is not None and not len(set(names)) == len(names) >= 2:
        raise ConfigError(
            f"labels must name each label once, and at least two; got {listed(names)}"
        )
