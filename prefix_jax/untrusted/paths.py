"""Paths that users type, and the bytes and text of small files."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from prefix_jax.errors import PrefixJaxError

# Configs, cards, indexes and tokenizers: the largest tokenizer.json known has 35 MB.
DEFAULT_LIMIT = 256 * 2**20
# The shell's process substitution, <(command), and standard input are pipes with a writer.
_PIPES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")


def expand(path: str | os.PathLike[str], error: type[PrefixJaxError]) -> Path:
    """Expands ``~`` and ``~user`` in a path, which need not exist.

    Args:
        path: as a user typed it.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if no file system call can use the path: it is too long,
            holds a null byte, loops through symbolic links, lies in a directory that this user may
            not enter, or there is no home directory to expand.
    """
    if "\0" in os.fspath(path):
        raise error(f"{_shorten(path)!r}: cannot be used as a path (it holds a null byte)")
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as failure:
        raise error(f"{path}: cannot expand ~ ({failure}); write the path out") from None
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
        path: of a regular file, or a pipe that the shell made: ``<(command)``.
        error: the class to raise.
        limit: the largest size to accept, in bytes.

    Raises:
        PrefixJaxError: of class `error`, if the file is missing, unreadable, over the limit, or
            not a regular file.
    """
    with open_binary(path, error, pipes=True) as (file, _):
        content = file.read(limit + 1)
    if len(content) > limit:
        raise error(f"{path}: larger than {limit:,} bytes, the most that is read of such a file")
    return content


@contextlib.contextmanager
def open_binary(
    path: str | os.PathLike[str], error: type[PrefixJaxError], *, pipes: bool = False
) -> Iterator[tuple[io.BufferedReader, int]]:
    """Opens a file of any size, of which only parts are read.

    Args:
        path: of a regular file.
        error: the class to raise.
        pipes: accept a pipe that the shell made, too: ``<(command)``.

    Yields:
        The file and its size in bytes, which is 0 for a pipe.

    Raises:
        PrefixJaxError: of class `error`, if the file is missing, unreadable or not a regular file,
            or if reading it fails inside the context.
    """
    path = expand(path, error)
    try:
        if not path.exists():
            raise error(f"{path}: no such file")
        if not (path.is_file() or (pipes and str(path).startswith(_PIPES))):
            raise error(f"{path}: {_kind(path)}; expected a regular file")
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as failure:
        raise error(f"{path}: cannot be read ({explain(failure)})") from failure


def read_text(
    path: str | os.PathLike[str], error: type[PrefixJaxError], *, limit: int = DEFAULT_LIMIT
) -> str:
    """Reads a whole file as UTF-8 text, without a byte-order mark. See `read_bytes`."""
    try:
        return read_bytes(path, error, limit=limit).decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(
            f"{path}: not UTF-8 text ({failure.reason} at byte {failure.start}); convert it"
        ) from failure


def explain(failure: BaseException) -> str:
    """The reason of a failed system call in a few words: "Permission denied"."""
    return getattr(failure, "strerror", None) or str(failure) or type(failure).__name__


def _kind(path: Path) -> str:
    """What is at a path that should hold a regular file, in words."""
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
