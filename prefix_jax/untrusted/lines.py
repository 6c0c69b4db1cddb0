"""Reads text files line by line, within limits on line length and file size."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from typing import Any

from prefix_jax.errors import PrefixJaxError
from prefix_jax.untrusted.paths import open_binary

# Characters per line.
MAX_LINE = 16 * 2**20
# Bytes per file. Records are kept in memory.
MAX_FILE = 8 * 2**30
# The first bytes of other formats, with a hint.
_SIGNATURES = (
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive; unpack it"),
    (b"\xfd7zXZ\x00", "an xz archive; unpack it"),
    (b"BZh", "a bzip2 archive; unpack it"),
    (b"PAR1", "a Parquet file; rename it to end in .parquet"),
    (b"\xff\xfe", "UTF-16; convert it"),
    (b"\xfe\xff", "UTF-16; convert it"),
)


def read_lines(
    path: str | os.PathLike[str],
    error: type[PrefixJaxError],
    *,
    newline: str | None = None,
    line_limit: int = MAX_LINE,
    limit: int = MAX_FILE,
) -> Iterator[tuple[int, str]]:
    r"""Yields the number, from 1, and the text of each line of a UTF-8 file.

    A byte-order mark is skipped.

    Args:
        path: a regular file, or a pipe of the shell.
        error: the class to raise.
        newline: as in `open`: None turns every line break into a newline, "" keeps them.
        line_limit: the maximum length of a line, in characters.
        limit: the maximum size of the file, in bytes.

    Raises:
        PrefixJaxError: of class `error`, if the file is missing, unreadable, over a limit, an
            archive, or not UTF-8.
    """
    too_large = f"{path}: larger than {limit:,} bytes; split the file, records are kept in memory"
    with open_binary(path, error, pipes=True) as (file, size):
        if size > limit:
            raise error(too_large)
        start = file.peek(8)
        for signature, advice in _SIGNATURES:
            if start.startswith(signature):
                raise error(f"{path}: not UTF-8 text but {advice}")
        # Invalid bytes become surrogates, so that the error can name their line.
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=newline)
        number, total = 0, 0
        while line := text.readline(line_limit + 1):
            number += 1
            total += len(line)
            if len(line) > line_limit:
                raise error(
                    f"{path}:{number}: the line has more than {line_limit:,} characters; "
                    "split the record"
                )
            if total > limit:
                raise error(too_large)
            if not line.isascii():
                _check_decoded(line, f"{path}:{number}", error)
            yield number, line


def check_text(value: Any, where: str, error: type[PrefixJaxError]) -> None:
    """Checks that lists, dicts, strings and numbers can be written as JSON in UTF-8.

    Values of other types are ignored.

    Args:
        value: the value, such as the fields of a record.
        where: the origin of the value, for messages.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if a string or a key contains an unpaired surrogate, a
            number has thousands of digits, or lists are nested too deeply.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=lambda _: None, skipkeys=True).encode()
    except UnicodeEncodeError as failure:
        start = max(failure.start - 20, 0)
        near = ascii(failure.object[start : failure.start + 1])
        raise error(
            f"{where}: not valid Unicode text: {failure.reason}, after {near}; correct it"
        ) from None
    except (ValueError, RecursionError) as failure:  # too many digits; a list that contains itself
        raise error(f"{where}: cannot be written as JSON ({failure})") from None


def _check_decoded(line: str, where: str, error: type[PrefixJaxError]) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as failure:
        raise error(
            f"{where}: not UTF-8 text (character {failure.start + 1} of the line is the byte "
            f"0x{ord(line[failure.start]) - 0xDC00:02x}); convert the file"
        ) from None
