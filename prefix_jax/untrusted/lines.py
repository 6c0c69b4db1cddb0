"""Lines of text files, with bounds on their length and on the size of the file."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from typing import Any

from prefix_jax.errors import PrefixJaxError
from prefix_jax.untrusted.paths import open_binary

# Characters of one line: a dozen novels.
MAX_LINE = 16 * 2**20
# Bytes of one file of records, which are held in memory.
MAX_FILE = 8 * 2**30
# The first bytes of files that are often renamed, or compressed, by mistake.
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
    r"""Yields the lines of a UTF-8 text file, each with its number, counted from 1.

    A byte-order mark is skipped.

    Args:
        path: of a regular file, or a pipe that the shell made.
        error: the class to raise.
        newline: as for `open`: None turns every line break into a newline, "" keeps them.
        line_limit: the longest line to accept, in characters.
        limit: the largest file to accept, in bytes.

    Raises:
        PrefixJaxError: of class `error`, if the file is missing, unreadable, over a limit, an
            archive, or not UTF-8.
    """
    too_large = f"{path}: larger than {limit:,} bytes; records are held in memory, so split it"
    with open_binary(path, error, pipes=True) as (file, size):
        if size > limit:
            raise error(too_large)
        start = file.peek(8)
        for signature, advice in _SIGNATURES:
            if start.startswith(signature):
                raise error(f"{path}: not UTF-8 text but {advice}")
        # Bytes that are not UTF-8 become halves of surrogate pairs, and their line is known.
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=newline)
        number, total = 0, 0
        while line := text.readline(line_limit + 1):
            number += 1
            total += len(line)
            if len(line) > line_limit:
                raise error(
                    f"{path}:{number}: a line of more than {line_limit:,} characters; "
                    "split the record"
                )
            if total > limit:
                raise error(too_large)
            if not line.isascii():
                _check_decoded(line, f"{path}:{number}", error)
            yield number, line


def check_text(value: Any, where: str, error: type[PrefixJaxError]) -> None:
    """Checks that a value of lists, mappings, texts and numbers can be written as JSON in UTF-8.

    Values of other types are ignored.

    Args:
        value: such as the fields of a record.
        where: the origin of the value, for messages.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if a text or a key holds half of a surrogate pair, as a
            JSON escape can, a number has thousands of digits, or lists are nested too deeply.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=lambda _: None, skipkeys=True).encode()
    except UnicodeEncodeError as failure:
        start = max(failure.start - 20, 0)
        near = ascii(failure.object[start : failure.start + 1])
        raise error(
            f"{where}: not valid Unicode text: {failure.reason}, after {near}; correct it"
        ) from None
    except (ValueError, RecursionError) as failure:  # 5,000 digits; a list in itself
        raise error(f"{where}: cannot be written as JSON ({failure})") from None


def _check_decoded(line: str, where: str, error: type[PrefixJaxError]) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as failure:
        raise error(
            f"{where}: not UTF-8 text (character {failure.start + 1} of the line is the byte "
            f"0x{ord(line[failure.start]) - 0xDC00:02x}); convert the file"
        ) from None
