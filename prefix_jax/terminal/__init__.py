"""Text on a terminal: the only place where text from files becomes safe to print.

Names, labels, predictions and error messages may contain text that came with a model, a data set
or a prefix. On a terminal, control characters in it could hide or rewrite lines, or do worse.
`escape` makes them visible; `print_error`, `print_warning`, `text` and every console of
`terminal.console` use it. Files and pipes receive text unchanged, see `printable`.
"""

from __future__ import annotations

import contextlib
import re
import sys
from typing import IO

# C0 controls but for tab and newline, DEL, C1 controls, bidirectional embeddings, overrides and
# isolates, and surrogates, which no encoding can write.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\N{LEFT-TO-RIGHT EMBEDDING}-\N{RIGHT-TO-LEFT OVERRIDE}"
    "\N{LEFT-TO-RIGHT ISOLATE}-\N{POP DIRECTIONAL ISOLATE}\ud800-\udfff]"
)


_LONGEST = 5000  # of an error, in characters: it may quote a value that fills a file


def escape(text: str) -> str:
    r"""Replaces characters that could steer a terminal by visible escapes: \x1b, \u202e.

    Tabs and newlines stay. The escapes beyond ASCII are valid in JSON strings too.
    """
    return _UNSAFE.sub(_visible, text)


def printable(text: str, stream: IO[str] | None = None) -> str:
    """Text for a stream: escaped for a terminal, unchanged for a file or a pipe.

    Args:
        text: what is printed.
        stream: where to; standard output by default.
    """
    stream = sys.stdout if stream is None else stream
    return escape(text) if stream is not None and stream.isatty() else text


def print_error(message: object) -> None:
    """Prints "error: …" on standard error, also where that is a log."""
    _print(f"error: {message}")


def print_warning(message: object) -> None:
    """Prints "warning: …" on standard error, also where that is a log."""
    _print(f"warning: {message}")


def _print(line: str) -> None:
    if len(line) > _LONGEST:
        line = f"{line[:_LONGEST]}… ({len(line):,} characters)"
    # A standard error that cannot be written must not replace the error by another.
    with contextlib.suppress(OSError, ValueError):
        print(escape(line), file=sys.stderr, flush=True)


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x7F else f"\\u{code:04x}"
