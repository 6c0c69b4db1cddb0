"""Preparations: derived fields for records of published datasets.

A preparation adds a field to each record for templates to use. Most datasets need none, because
templates can use their fields directly.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable

from prefix_jax.data.source import Record, shown
from prefix_jax.errors import ConfigError, DataError

# The names of meaning-representation slots in Li & Liang's E2E files.
_SLOTS = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
_SLOT = re.compile(r"([^\[\],]+)\[([^\]]*)\]\s*(?:,|$)")


def _e2e(record: Record) -> str:
    """Linearises a meaning representation (E2E, Novikova et al. 2017), as Li & Liang 2021 do.

    "name[The Eagle], eatType[pub]" becomes "name : The Eagle | Type : pub".
    """
    text = _text(record, "mr")
    slots, end = [], 0
    while (found := _SLOT.match(text, end)) and (name := found[1].strip()):
        slots.append(f"{_SLOTS.get(name, name)} : {found[2]}")
        end = found.end()
    if not slots or text[end:].strip():
        raise DataError(
            f"{record.origin}: invalid meaning representation {shown(text)}; expected the form "
            "'name[The Eagle], eatType[pub]'"
        )
    return " | ".join(slots)


def _web_nlg(record: Record) -> str:
    """Writes each triple as " | subject : predicate : object".

    The dataset is WebNLG (Gardent et al. 2017), and the format that of Li & Liang 2021.
    """
    return "".join(f" | {triple}" for triple in _triples(record, "input"))


def _dart(record: Record) -> str:
    """Writes the triples as "subject : predicate : object | …", with lower-case predicates.

    The dataset is DART (Nan et al. 2021), and the format that of Li & Liang 2021.
    """
    return " | ".join(_triples(record, "tripleset", lower=True))


def _copa(record: Record) -> str:
    """Appends "because" or "so" to the premise, depending on the question.

    The dataset is COPA in SuperGLUE, and the format that of P-tuning v2 (Liu et al. 2022).
    """
    # SuperGLUE's own files use words, TFDS uses numbers: 0 is the cause.
    question = record.value("question")
    kinds = {"cause": "because", 0: "because", "effect": "so", 1: "so"}
    if type(question) not in (str, int) or question not in kinds:
        raise DataError(
            f"{record.origin}: the question must be 'cause' or 'effect', got {shown(question)}"
        )
    return f"{_text(record, 'premise')} {kinds[question]}"


def _named(*names: str) -> Callable[[Record], str]:
    """Maps the label numbers of TFDS to label names, and leaves names unchanged."""

    def make(record: Record) -> str:
        label = record.value("label")
        if label in names:
            return str(label)
        # A boolean would be the number 0 or 1.
        if type(label) is not int or not 0 <= label < len(names):
            raise DataError(
                f"{record.origin}: the label must be {', '.join(names)} or a number from 0 to "
                f"{len(names) - 1}, got {shown(label)}; the test splits of GLUE have no labels"
            )
        return names[label]

    return make


@dataclasses.dataclass(frozen=True)
class Preparation:
    """A derived field for records of a published dataset.

    Attributes:
        field: the name of the new field.
        needs: the fields that it is computed from.
        make: computes its value.
    """

    field: str
    needs: tuple[str, ...]
    make: Callable[[Record], str]


PREPARE = {
    "e2e": Preparation("source", ("mr",), _e2e),
    "web_nlg": Preparation("source", ("input",), _web_nlg),
    "dart": Preparation("source", ("tripleset",), _dart),
    "copa": Preparation("start", ("premise", "question"), _copa),
    "sst2": Preparation("answer", ("label",), _named("negative", "positive")),
    "mrpc": Preparation("answer", ("label",), _named("not_equivalent", "equivalent")),
    "rte": Preparation("answer", ("label",), _named("entailment", "not_entailment")),
}


def fields_needed(names: Iterable[str], name: str | None) -> tuple[str, ...]:
    """Returns the fields that a record needs before preparation, given those in the templates.

    Raises:
        ConfigError: the name of the preparation is unknown.
    """
    if name is None:
        return tuple(names)
    preparation = _named_preparation(name)
    expanded = (preparation.needs if field == preparation.field else (field,) for field in names)
    return tuple(dict.fromkeys(field for part in expanded for field in part))


def prepare_records(records: Iterable[Record], name: str | None) -> list[Record]:
    """Adds the field of `PREPARE[name]` to each record; None adds nothing.

    Raises:
        ConfigError: the name is unknown.
        DataError: a record does not have the dataset's format.
    """
    if name is None:
        return list(records)
    preparation = _named_preparation(name)
    return [
        dataclasses.replace(
            record, fields={**record.fields, preparation.field: preparation.make(record)}
        )
        for record in records
    ]


def _named_preparation(name: str) -> Preparation:
    if name not in PREPARE:
        near = difflib.get_close_matches(name, PREPARE, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"data.prepare {name!r}: {hint}choose one of {', '.join(PREPARE)}")
    return PREPARE[name]


def _text(record: Record, field: str) -> str:
    value = record.value(field)
    if not isinstance(value, str):
        raise DataError(
            f"{record.origin}: field {field!r} must be a text, got {type(value).__name__}"
        )
    return value


def _triples(record: Record, field: str, lower: bool = False) -> list[str]:
    """Formats triples, "s | p | o" or lists of three, as "subject : predicate : object"."""
    value = record.value(field)
    if not isinstance(value, list) or not value:
        raise DataError(f"{record.origin}: field {field!r} must be a non-empty list of triples")
    triples = []
    for triple in value:
        parts = triple.split(" | ") if isinstance(triple, str) else triple
        if (
            not isinstance(parts, list)
            or len(parts) != 3
            or not all(isinstance(part, str | int | float) for part in parts)
        ):
            raise DataError(
                f"{record.origin}: {shown(triple)} in field {field!r} is not a triple; expected "
                "'subject | predicate | object'"
            )
        subject, predicate, object_ = map(str, parts)
        triples.append(f"{subject} : {predicate.lower() if lower else predicate} : {object_}")
    return triples
