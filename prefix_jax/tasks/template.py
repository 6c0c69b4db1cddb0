"""Text templates with record fields in braces."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterable

from prefix_jax.data.source import Record
from prefix_jax.errors import DataError

# Maximum texts in a list; each becomes an example with the whole input.
MAX_ALTERNATIVES = 10_000


@dataclasses.dataclass(frozen=True)
class Template:
    """A text with fields in braces: "{mr} => ". A literal brace is doubled.

    Braces contain only the name of a field: "{a.b}" is the field named "a.b". Indices, attributes,
    conversions and format specifications are not supported.

    Raises:
        DataError: a brace is unbalanced, or braces contain anything but a name.
    """

    text: str

    def __post_init__(self) -> None:
        self._parts()

    @property
    def fields(self) -> tuple[str, ...]:
        """The names in braces, in order."""
        return tuple(name for _, name in self._parts() if name is not None)

    def render(self, record: Record) -> list[str]:
        """Renders a record as one text, or as several if a field is a list of alternatives.

        Raises:
            DataError: a field is missing, null, NaN or not text, or two fields are lists.
        """
        texts, listed = [""], None
        for literal, name in self._parts():
            values = [""] if name is None else texts_of(record, name)
            if name is not None and isinstance(record.value(name), list):
                if listed is not None:
                    raise DataError(
                        f"{record.origin}: fields {listed!r} and {name!r} are both lists; "
                        f"the template {self.text!r} may use only one list"
                    )
                listed = name
            texts = [text + literal + value for text in texts for value in values]
        return texts

    def render_one(self, record: Record) -> str:
        """Renders a record as exactly one text.

        Raises:
            DataError: see `render`; or a field is a list of several alternatives.
        """
        texts = self.render(record)
        if len(texts) > 1:
            raise DataError(
                f"{record.origin}: {self.text!r} has {len(texts)} alternatives; an input must have "
                "exactly one text"
            )
        return texts[0]

    def _parts(self) -> list[tuple[str, str | None]]:
        """Splits the text into pairs of literal text and the name of the next field, if any."""
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise DataError(
                f"template {self.text!r}: {error}; write a literal brace twice"
            ) from error
        for _, name, spec, conversion in parts:
            if name is not None and (not name or spec or conversion):
                raise DataError(
                    f"template {self.text!r}: braces may contain only the name of a field; "
                    "write a literal brace twice"
                )
        return [(literal, name) for literal, name, _, _ in parts]


def texts_of(record: Record, name: str) -> list[str]:
    """Returns a field as texts: one, or those of a list.

    Raises:
        DataError: the field is missing, null, NaN, empty or not text.
    """
    value = record.value(name)
    values = value if isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, str | int | float):
            raise DataError(
                f"{record.origin}: field {name!r} must be a text or a number, got "
                f"{type(item).__name__}"
            )
        if item != item:
            raise DataError(
                f"{record.origin}: field {name!r} contains NaN; fill it in or remove it"
            )
    if not values:
        raise DataError(f"{record.origin}: field {name!r} is an empty list")
    if len(values) > MAX_ALTERNATIVES:
        raise DataError(
            f"{record.origin}: field {name!r} is a list of {len(values):,} texts; at most "
            f"{MAX_ALTERNATIVES:,} are supported, since each becomes an example"
        )
    texts = [str(item) for item in values]
    check_unicode(texts, record.origin)
    return texts


def check_unicode(texts: Iterable[str], origin: str) -> None:
    """Raises DataError for unpaired surrogates, which JSON allows and tokenizers cannot encode.

    Args:
        texts: the texts of a record.
        origin: where the record comes from.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{origin}: not valid Unicode text: {error.reason}") from None
