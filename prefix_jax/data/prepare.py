"""What records of published data sets need before a template can render them.

A preparation adds a field to a record, which templates then name. Most sets need none: templates
name the fields that they have.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable

from prefix_jax.data.source import Record, shown
from prefix_jax.errors import ConfigError, DataError

# The names under which Li & Liang's E2E files hold the slots of a meaning representation.
_SLOTS = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
_SLOT = re.compile(r"([^\[\],]+)\[([^\]]*)\]\s*(?:,|$)")


def _e2e(record: Record) -> str:
    """The pairs of a meaning representation: "name : The Eagle | Type : pub" from "name[The
    Eagle], eatType[pub]" (E2E, Novikova et al. 2017; the form of Li & Liang 2021)."""
    text = _text(record, "mr")
    slots, end = [], 0
    while (found := _SLOT.match(text, end)) and (name := found[1].strip()):
        slots.append(f"{_SLOTS.get(name, name)} : {found[2]}")
        end = found.end()
    if not slots or text[end:].strip():
        raise DataError(
            f"{record.source}: the meaning representation {shown(text)} is not of the form "
            "'name[The Eagle], eatType[pub]'"
        )
    return " | ".join(slots)


def _web_nlg(record: Record) -> str:
    """For every triple " | subject : predicate : object" (WebNLG, Gardent et al. 2017; the form
    of Li & Liang 2021)."""
    return "".join(f" | {triple}" for triple in _triples(record, "input"))


def _dart(record: Record) -> str:
    """The triples as "subject : predicate : object | …", predicates in lower case (DART, Nan et al.
    2021; the form of Li & Liang 2021)."""
    return " | ".join(_triples(record, "tripleset", lower=True))


def _copa(record: Record) -> str:
    """The premise with "because" or "so" behind it, whichever its question asks for (COPA in
    SuperGLUE; the form of P-tuning v2, Liu et al. 2022)."""
    # SuperGLUE's own files say it in words, TFDS by number: 0 is the cause.
    question = record.value("question")
    kinds = {"cause": "because", 0: "because", "effect": "so", 1: "so"}
    if type(question) not in (str, int) or question not in kinds:
        raise DataError(
            f"{record.source}: the question {shown(question)} is neither 'cause' nor 'effect'"
        )
    return f"{_text(record, 'premise')} {kinds[question]}"


def _named(*names: str) -> Callable[[Record], str]:
    """The name of a label that TFDS stores as a number; a name stays what it is."""

    def make(record: Record) -> str:
        label = record.value("label")
        if label in names:
            return str(label)
        # A boolean would be the number 0 or 1.
        if type(label) is not int or not 0 <= label < len(names):
            raise DataError(
                f"{record.source}: the label {shown(label)} is none of {', '.join(names)}, nor a "
                f"number from 0 to {len(names) - 1}; the test split of GLUE has no labels"
            )
        return names[label]

    return make


@dataclasses.dataclass(frozen=True)
class Preparation:
    """A field that records of a published set gain.

    Attributes:
        field: its name.
        needs: the fields that it is made of.
        make: its value.
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
    """The fields that a record must have if templates name these, before it is prepared.

    Raises:
        ConfigError: the name of the preparation is unknown.
    """
    if name is None:
        return tuple(names)
    made = _named_preparation(name)
    expanded = (made.needs if field == made.field else (field,) for field in names)
    return tuple(dict.fromkeys(field for part in expanded for field in part))


def prepare(records: Iterable[Record], name: str | None) -> list[Record]:
    """The records with the field that `PREPARE[name]` makes of each; None adds nothing.

    Raises:
        ConfigError: the name is unknown.
        DataError: a record is not of the data set.
    """
    if name is None:
        return list(records)
    made = _named_preparation(name)
    return [
        dataclasses.replace(record, fields={**record.fields, made.field: made.make(record)})
        for record in records
    ]


def _named_preparation(name: str) -> Preparation:
    if name not in PREPARE:
        near = difflib.get_close_matches(name, PREPARE, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"data.prepare {name!r}: {hint}there are {', '.join(PREPARE)}")
    return PREPARE[name]


def _text(record: Record, field: str) -> str:
    value = record.value(field)
    if not isinstance(value, str):
        raise DataError(f"{record.source}: field {field!r} holds a {type(value).__name__}, no text")
    return value


def _triples(record: Record, field: str, lower: bool = False) -> list[str]:
    """Every triple, which is "s | p | o" or a list of three, as "subject : predicate : object"."""
    value = record.value(field)
    if not isinstance(value, list) or not value:
        raise DataError(f"{record.source}: field {field!r} is not a list of triples")
    triples = []
    for triple in value:
        parts = triple.split(" | ") if isinstance(triple, str) else triple
        if (
            not isinstance(parts, list)
            or len(parts) != 3
            or not all(isinstance(part, str | int | float) for part in parts)
        ):
            raise DataError(
                f"{record.source}: {shown(triple)} in {field!r} is not a triple: expected "
                "'subject | predicate | object'"
            )
        subject, predicate, object_ = map(str, parts)
        triples.append(f"{subject} : {predicate.lower() if lower else predicate} : {object_}")
    return triples
