"""Checks names and labels before a run that will store them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from prefix_jax.errors import PrefixJaxError

# File systems allow 255 bytes, encrypted ones 143; suffixes need some of them.
MAX_NAME_BYTES = 120
# Characters. A longer label is probably a text from the wrong field.
MAX_LABEL_LENGTH = 1000

_NAME = re.compile(r"\w[\w-]*(\.[\w-]+)*")


def check_storable_names(names: Iterable[str], where: str, error: type[PrefixJaxError]) -> None:
    """Checks that names can be used as directories next to each other, on any file system.

    Args:
        names: the names.
        where: the origin of the names, for messages, such as "method.datasets".
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if a name contains other characters than letters, digits,
            "_", "-" and inner dots, is longer than `MAX_NAME_BYTES` in UTF-8, or equals another
            name up to case and Unicode normalisation.
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
                f"{where}: {_shorten(name)} has {length} bytes, too many for a directory name; use "
                f"at most {MAX_NAME_BYTES}"
            )
        folded = _folded(name)
        if (twin := seen.get(folded)) == name:
            raise error(f"{where}: {_shorten(name)} appears twice; remove or rename one")
        if twin is not None:
            raise error(
                f"{where}: {_shorten(twin)} and {_shorten(name)} would share a directory on file "
                "systems that ignore case or normalise Unicode; rename one"
            )
        seen[folded] = name


def check_storable_labels(labels: Iterable[str], where: str, error: type[PrefixJaxError]) -> None:
    """Checks that labels can be written as JSON in UTF-8 and have a sensible length.

    Args:
        labels: the labels.
        where: the origin of the labels, for messages, such as "task.labels".
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if a label contains an unpaired surrogate or is longer
            than `MAX_LABEL_LENGTH`.
    """
    for label in labels:
        if len(label) > MAX_LABEL_LENGTH:
            raise error(
                f"{where}: the label {_shorten(label)} has {len(label):,} characters, at most "
                f"{MAX_LABEL_LENGTH:,} are allowed"
            )
        try:
            label.encode()
        except UnicodeEncodeError as failure:
            raise error(
                f"{where}: the label {_shorten(label)} is not valid Unicode text "
                f"({failure.reason}); correct it"
            ) from None


def _folded(name: str) -> str:
    """Returns the form in which file systems compare names."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def _shorten(text: str, length: int = 60) -> str:
    return repr(text) if len(text) <= length else f"{text[:length]!r}…"
