"""Expands paths from users, opens files, and reads small ones whole."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from prefix_jax.errors import PrefixJaxError

# For configs, cards, indexes and tokenizers. The largest known tokenizer.json has 35 MB.
DEFAULT_LIMIT = 256 * 2**20
# Process substitution, <(command), and standard input are pipes that have a writer.
_PIPES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")


def expand(path: str | os.PathLike[str], error: type[PrefixJaxError]) -> Path:
    """Expands ``~`` and ``~user`` in a path, which need not exist.

    Args:
        path: the path as the user typed it.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if the path cannot be used: it is too long, contains a
            null byte or a loop of symbolic links, is in a directory without search permission, or
            the home directory is unknown.
    """
    if "\0" in os.fspath(path):
        raise error(f"{_shorten(path)!r}: cannot be used as a path (it contains a null byte)")
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as failure:
        raise error(f"{path}: cannot expand ~ ({failure}); give the full path") from None
    try:
        expanded.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as failure:
        raise error(f"{_shorten(path)}: cannot be used as a path ({explain(failure)})") from None
    return expanded


def read_bytes(
    path: str | os.PathLike[str], error: type[PrefixJaxError], *, limit: int = DEFAULT_LIMIT
) -> bytes:
    """Reads a whole file.

    Args:
        path: a regular file, or a pipe of the shell: ``<(command)``.
        error: the class to raise.
        limit: the maximum size, in bytes.

    Raises:
        PrefixJaxError: of class `error`, if the file is missing, unreadable, over the limit, or
            not a regular file.
    """
    with open_binary(path, error, pipes=True) as (file, _):
        content = file.read(limit + 1)
    if len(content) > limit:
        raise error(f"{path}: larger than {limit:,} bytes, the limit for such files")
    return content


@contextlib.contextmanager
def open_binary(
    path: str | os.PathLike[str], error: type[PrefixJaxError], *, pipes: bool = False
) -> Iterator[tuple[io.BufferedReader, int]]:
    """Opens a file for reading.

    Args:
        path: a regular file.
        error: the class to raise.
        pipes: also accept a pipe of the shell: ``<(command)``.

    Yields:
        The file and its size in bytes, which is 0 for a pipe.

    Raises:
        PrefixJaxError: of class `error`, if the file is missing, unreadable or not a regular file,
            or if a read inside the context fails.
    """
    path = expand(path, error)
    try:
        if not path.exists():
            raise error(f"{path}: no such file")
        if not (path.is_file() or (pipes and str(path).startswith(_PIPES))):
            raise error(f"{path}: expected a regular file, got {_kind(path)}")
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as failure:
        raise error(f"{path}: cannot be read ({explain(failure)})") from failure


def read_text(
    path: str | os.PathLike[str], error: type[PrefixJaxError], *, limit: int = DEFAULT_LIMIT
) -> str:
    """Reads a whole file as UTF-8 text, without a byte-order mark.

    Args:
        path: a regular file, or a pipe of the shell.
        error: the class to raise.
        limit: the maximum size in bytes.

    Raises:
        PrefixJaxError: of class `error`, if the file cannot be read, is too large or not UTF-8.
    """
    try:
        return read_bytes(path, error, limit=limit).decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(
            f"{path}: not UTF-8 text ({failure.reason} at byte {failure.start}); convert it"
        ) from failure


def explain(failure: BaseException) -> str:
    """Returns the reason for a failed system call, such as "Permission denied"."""
    return getattr(failure, "strerror", None) or str(failure) or type(failure).__name__


def _kind(path: Path) -> str:
    """Returns the type of a file that is not a regular file, with an article."""
    mode = path.stat().st_mode
    for test, words in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if test(mode):
            return words
    return "a device"


def _shorten(path: str | os.PathLike[str], length: int = 120) -> str:
    text = os.fspath(path)
    return text if len(text) <= length else f"{text[:length]}…"
