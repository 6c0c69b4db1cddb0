"""Standard streams that are closed, full, or of an encoding with few characters."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from pathlib import Path
from typing import IO

FALLBACK = "prefix_jax.fallback"
"""Error handler of `str.encode` that spells out characters that an encoding lacks."""

_SPELLED = {
    "…": "...",
    "–": "-",
    "×": "x",
    "·": "*",
    "’": "'",
    "“": '"',
    "”": '"',
    # Bars of rich end in a part of a block.
    **dict.fromkeys("█▉▊▋▌", "#"),
    **dict.fromkeys("▍▎▏▐▕", " "),
}


def prepare() -> None:
    """Makes standard streams usable, whatever the shell handed over.

    A closed stream is replaced by the null device: otherwise the next file that is opened would
    take its descriptor, and receive what libraries print. Characters that the encoding of a stream
    lacks are spelled out instead of raising `UnicodeEncodeError`.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, _null(descriptor, mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors=FALLBACK)


def discard_stdout() -> None:
    """Sends what is left for standard output to the null device.

    After a failed write Python would write it again at exit, and complain.
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
    # Open, but of no use to Python: a directory as standard input, for one.
    return Path(os.devnull).open(mode, encoding="utf-8")


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    spelled = (
        _SPELLED.get(character) or character.encode("ascii", "backslashreplace").decode()
        for character in wrong
    )
    return "".join(spelled), error.end


codecs.register_error(FALLBACK, _spell)
