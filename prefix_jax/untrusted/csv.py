"""Reads CSV files with a header, within limits on row length and number of columns."""

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
    """Yields the number of each row's first line, and the row as {column: cell}.

    Blank lines are skipped.

    Args:
        path: the file.
        error: the class to raise.
        row_limit: the maximum length of a row, in characters.

    Raises:
        PrefixJaxError: of class `error`, if the file cannot be read (see `read_lines`), has two
            columns of the same name, or has a row that is malformed, too long, or of the wrong
            length.
    """
    start = 1  # the first line of the current row
    length = 0  # its characters so far

    def lines() -> Iterator[str]:
        nonlocal length
        for number, line in read_lines(path, error, newline="", line_limit=row_limit):
            length += len(line)
            if length > row_limit:
                raise error(
                    f"{path}:{start}: the row has more than {row_limit:,} characters; check for a "
                    "missing closing double quote"
                )
            if "\0" in line:
                raise error(f"{path}:{number}: the line contains a null byte; remove it")
            yield line

    # Python's default limit of 128 KiB is too small for documents.
    previous_limit = csv.field_size_limit(row_limit)
    try:
        rows = csv.reader(lines(), strict=True)
        names: list[str] | None = None
        for row in rows:
            if names is None:
                names = _header(row, f"{path}:{start}", error)
            elif row:
                if len(row) != len(names):
                    raise error(
                        f"{path}:{start}: {len(row)} cells, but the header has {len(names)} "
                        'columns; put cells that contain commas in double quotes ("…")'
                    )
                yield start, dict(zip(names, row, strict=True))
            start, length = rows.line_num + 1, 0
    except csv.Error as failure:
        raise error(
            f"{path}:{start}: malformed CSV ({failure}); in a quoted cell, write a double quote "
            "twice"
        ) from failure
    finally:
        csv.field_size_limit(previous_limit)


def _header(names: list[str], where: str, error: type[PrefixJaxError]) -> list[str]:
    if len(names) > MAX_COLUMNS:
        raise error(f"{where}: {len(names):,} columns, at most {MAX_COLUMNS:,} are supported")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise error(f"{where}: the column {name[:60]!r} appears twice; rename one")
        seen.add(name)
    return names
