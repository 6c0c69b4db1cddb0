"""Handles standard streams that are closed, full, or use a limited encoding."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from pathlib import Path
from typing import IO

FALLBACK = "prefix_jax.fallback"
"""Name of the error handler of `str.encode` that replaces characters with similar ones."""

_REPLACEMENTS = {
    "…": "...",
    "–": "-",
    "×": "x",
    "·": "*",
    "’": "'",
    "“": '"',
    "”": '"',
    # Rich draws the end of a bar with partial blocks.
    **dict.fromkeys("█▉▊▋▌", "#"),
    **dict.fromkeys("▍▎▏▐▕", " "),
}


def prepare() -> None:
    """Makes the standard streams safe to use.

    Closed streams are connected to the null device. Otherwise the next open file would get their
    descriptor and receive the output of libraries. Characters outside a stream's encoding are
    replaced instead of raising `UnicodeEncodeError`.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, _null(descriptor, mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors=FALLBACK)


def discard_stdout() -> None:
    """Redirects the rest of standard output to the null device.

    After a failed write, Python would flush the buffer again at exit and print an error.
    """
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _null(descriptor: int, mode: str) -> IO[str]:
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        return open(descriptor, mode, encoding="utf-8", closefd=False)
    # The descriptor is open but unusable, such as a directory as standard input.
    return Path(os.devnull).open(mode, encoding="utf-8")


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    replacements = (
        _REPLACEMENTS.get(character) or character.encode("ascii", "backslashreplace").decode()
        for character in error.object[error.start : error.end]
    )
    return "".join(replacements), error.end


codecs.register_error(FALLBACK, _replace)
