"""Names and labels that a run will store, checked before it trains."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from prefix_jax.errors import PrefixJaxError

# File systems allow 255 bytes, and some that encrypt 143; a name is also written with a suffix.
MAX_NAME_BYTES = 120
# Characters of a label: more is a text, read from the wrong field.
MAX_LABEL_LENGTH = 1000

_NAME = re.compile(r"\w[\w-]*(\.[\w-]+)*")


def check_storable_names(names: Iterable[str], where: str, error: type[PrefixJaxError]) -> None:
    """Checks that each name can name a directory of its own, on any file system.

    Args:
        names: one per directory.
        where: the origin of the names, for messages: "method.tasks".
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if a name holds anything but letters, digits, "_", "-"
            and inner dots, is longer than `MAX_NAME_BYTES` in UTF-8, or equals another up to case
            and Unicode normalisation.
    """
    seen: dict[str, str] = {}
    for name in names:
        if not _NAME.fullmatch(name):
            raise error(
                f"{where}: {_shorten(name)} cannot name a directory; use letters, digits, '_', '-' "
                "and inner dots"
            )
        if (length := len(name.encode())) > MAX_NAME_BYTES:
            raise error(
                f"{where}: {_shorten(name)} has {length} bytes, too long for the name of a "
                f"directory; use at most {MAX_NAME_BYTES}"
            )
        folded = _folded(name)
        if (twin := seen.get(folded)) == name:
            raise error(f"{where}: {_shorten(name)} appears twice; name each of them once")
        if twin is not None:
            raise error(
                f"{where}: {_shorten(twin)} and {_shorten(name)} would share a directory on file "
                "systems that ignore case or normalise Unicode; rename one of them"
            )
        seen[folded] = name


def check_storable_labels(labels: Iterable[str], where: str, error: type[PrefixJaxError]) -> None:
    """Checks that labels can be written to JSON as UTF-8, and are labels and no texts.

    Args:
        labels: the labels.
        where: the origin of the labels, for messages: "task.labels".
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if a label holds half of a surrogate pair or is longer
            than `MAX_LABEL_LENGTH`.
    """
    for label in labels:
        if len(label) > MAX_LABEL_LENGTH:
            raise error(
                f"{where}: the label {_shorten(label)} has {len(label):,} characters; a label has "
                f"at most {MAX_LABEL_LENGTH:,}"
            )
        try:
            label.encode()
        except UnicodeEncodeError as failure:
            raise error(
                f"{where}: the label {_shorten(label)} is not valid Unicode text "
                f"({failure.reason}); correct it"
            ) from None


def _folded(name: str) -> str:
    """The form in which file systems compare names."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def _shorten(text: str, length: int = 60) -> str:
    return repr(text) if len(text) <= length else f"{text[:length]!r}…"
