"""Safe output of untrusted text to a terminal.

Names, labels, predictions and error messages may contain text from a model, a data set or a prefix.
Control characters in it could hide or rewrite lines of a terminal, or do worse. `escape` makes them
visible; `print_error`, `print_warning`, `text` and every console of `terminal.console` use it.
Files and pipes receive text unchanged (see `printable`).
"""

from __future__ import annotations

import contextlib
import re
import sys
from typing import IO

# C0 controls except tab and newline, DEL, C1 controls, bidirectional embeddings, overrides and
# isolates, and surrogates, which cannot be encoded.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\N{LEFT-TO-RIGHT EMBEDDING}-\N{RIGHT-TO-LEFT OVERRIDE}"
    "\N{LEFT-TO-RIGHT ISOLATE}-\N{POP DIRECTIONAL ISOLATE}\ud800-\udfff]"
)


_MAX_MESSAGE = 5000  # characters; an error may quote a very large value


def escape(text: str) -> str:
    r"""Replaces characters that could control a terminal with visible escapes: \x1b, \u202e.

    Tabs and newlines stay. The escapes of non-ASCII characters are also valid in JSON strings.
    """
    return _UNSAFE.sub(_visible, text)


def printable(text: str, stream: IO[str] | None = None) -> str:
    """Returns the text to print to a stream: escaped for a terminal, otherwise unchanged.

    Args:
        text: the text.
        stream: the stream; standard output by default.
    """
    stream = sys.stdout if stream is None else stream
    return escape(text) if stream is not None and stream.isatty() else text


def print_error(message: object) -> None:
    """Prints "error: …" to standard error, escaped even if it is a file."""
    _print(f"error: {message}")


def print_warning(message: object) -> None:
    """Prints "warning: …" to standard error, escaped even if it is a file."""
    _print(f"warning: {message}")


def _print(line: str) -> None:
    if len(line) > _MAX_MESSAGE:
        line = f"{line[:_MAX_MESSAGE]}… ({len(line):,} characters)"
    # A failed write to standard error must not hide the original error.
    with contextlib.suppress(OSError, ValueError):
        print(escape(line), file=sys.stderr, flush=True)


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x7F else f"\\u{code:04x}"
