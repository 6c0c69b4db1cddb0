"""CSV with a header, and with bounds on the size of a row and the number of columns."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator

from prefix_jax.errors import PrefixJaxError
from prefix_jax.untrusted.lines import MAX_LINE, read_lines

MAX_COLUMNS = 10_000


def read_csv(
    path: str | os.PathLike[str], error: type[PrefixJaxError], *, row_limit: int = MAX_LINE
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the rows of a file as {column: cell}, each with the number of its first line.

    Blank lines are skipped.

    Args:
        path: of the file.
        error: the class to raise.
        row_limit: the longest row to accept, in characters.

    Raises:
        PrefixJaxError: of class `error`, if the file cannot be read (see `read_lines`), names a
            column twice, or has a row that is malformed, too long, or of the wrong length.
    """
    start = 1  # the first line of the current row
    length = 0  # its characters so far

    def lines() -> Iterator[str]:
        nonlocal length
        for number, line in read_lines(path, error, newline="", line_limit=row_limit):
            length += len(line)
            if length > row_limit:
                raise error(
                    f"{path}:{start}: a row of more than {row_limit:,} characters; is a double "
                    "quote left open?"
                )
            if "\0" in line:
                raise error(f"{path}:{number}: a null byte, which no text holds; remove it")
            yield line

    # Python's own limit is 128 KiB, and a cell may hold a whole document.
    before = csv.field_size_limit(row_limit)
    try:
        rows = csv.reader(lines(), strict=True)
        names: list[str] | None = None
        for row in rows:
            if names is None:
                names = _header(row, f"{path}:{start}", error)
            elif row:
                if len(row) != len(names):
                    raise error(
                        f"{path}:{start}: {len(row)} cells under {len(names)} columns; "
                        'put cells that hold commas into double quotes ("…")'
                    )
                yield start, dict(zip(names, row, strict=True))
            start, length = rows.line_num + 1, 0
    except csv.Error as failure:
        raise error(
            f"{path}:{start}: malformed CSV ({failure}); in a quoted cell, write a double quote "
            "twice"
        ) from failure
    finally:
        csv.field_size_limit(before)


def _header(names: list[str], where: str, error: type[PrefixJaxError]) -> list[str]:
    if len(names) > MAX_COLUMNS:
        raise error(f"{where}: {len(names):,} columns; at most {MAX_COLUMNS:,} are read")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise error(f"{where}: the header names the column {name[:60]!r} twice; rename one")
        seen.add(name)
    return names
