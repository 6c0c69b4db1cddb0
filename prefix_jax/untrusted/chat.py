"""Renders chat templates in a child process with limits on memory and time.

A chat template is a program. Jinja's sandbox blocks access to files and to Python's internals, but
not endless loops or strings that fill memory, so templates run in a child process (see
`chat_worker.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefix_jax.errors import PrefixJaxError
from prefix_jax.untrusted.tokenizer import MAX_CHARACTERS

# Limits per rendering, which usually needs well under a millisecond and a few megabytes.
CPU_SECONDS = 10.0
MEMORY_BYTES = 512 * 2**20
# Generous: it only ends a worker that sleeps or was stopped. CPU time limits the others.
WALL_SECONDS = 120.0
# Published templates have up to 20,000 characters.
MAX_TEMPLATE_CHARACTERS = 1_000_000

# The environment variables that the worker inherits, for starting Python and for the time zone.
_ENVIRONMENT = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


def render_chat_template(
    template: str,
    variables: Mapping[str, Any],
    turns: Sequence[Mapping[str, Any]],
    cuts: Sequence[tuple[int, bool]],
    where: str,
    error: type[PrefixJaxError],
) -> list[str]:
    """Renders a chat with a template, like `apply_chat_template` of transformers.

    Thread-safe; only one thread renders at a time.

    Args:
        template: the Jinja source.
        variables: the tokenizer's special tokens by role.
        turns: the turns of the chat.
        cuts: for each text to render, the number of turns, and whether an answer follows
            (`add_generation_prompt`).
        where: the record, for messages.
        error: the class to raise.

    Returns:
        One text per cut.

    Raises:
        PrefixJaxError: of class `error`, if the template is malformed, rejects the chat, fails, or
            exceeds the limits on memory, time or length.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise error(
            f"{where}: the tokenizer's chat template has {len(template):,} characters, at most "
            f"{MAX_TEMPLATE_CHARACTERS:,} are supported"
        )
    try:
        chat = json.dumps([dict(turn) for turn in turns], default=_plain, skipkeys=True)
    except (RecursionError, ValueError) as failure:
        raise error(f"{where}: the chat cannot be passed to a template ({failure})") from None
    with _lock:
        try:
            replies = _worker.render(template, dict(variables), chat, cuts)
        except _WorkerError as failure:
            raise error(f"{where}: the tokenizer's chat template {failure}") from None
    for reply in replies:
        if "text" not in reply:
            raise error(f"{where}: the tokenizer's chat template {_explain(reply)}")
    return [reply["text"] for reply in replies]


class _WorkerError(Exception):
    """The worker gave no reply. The message continues "the tokenizer's chat template …"."""


class _Worker:
    """A child process that renders templates. It starts on first use and after each failure."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._template: tuple[str, dict[str, Any]] | None = None
        self._buffer = b""
        self._stop: Any = None

    def render(
        self,
        template: str,
        variables: dict[str, Any],
        chat: str,
        cuts: Sequence[tuple[int, bool]],
    ) -> list[dict[str, Any]]:
        """Returns one reply per cut, up to the first error."""
        replies: list[dict[str, Any]] = []
        try:
            if self._process is None:
                self._start()
            parts = [f'"turns": {chat}', f'"cuts": {json.dumps(cuts)}']
            if self._template != (template, variables):
                parts += [f'"template": {json.dumps(template)}']
                parts += [f'"variables": {json.dumps(variables, default=str)}']
            self._write("{" + ", ".join(parts) + "}")
            self._template = (template, variables)
            for _ in cuts:
                replies.append(self._read())
                if replies[-1].get("error") in ("memory", "output"):
                    self.stop()
                    break
        except BaseException:  # also Ctrl-C: an unread reply would be taken for the next chat's
            self.stop()
            raise
        return replies

    def stop(self) -> None:
        """Stops the process if it runs."""
        if self._stop is not None:
            self._stop()
        self._process, self._template, self._buffer = None, None, b""

    def _start(self) -> None:
        script = str(Path(__file__).with_name("chat_worker.py"))
        try:
            # With -I -S, neither the environment nor the working directory can add code. In a new
            # session, the worker does not receive Ctrl-C.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,
            )
        except OSError as failure:
            raise _WorkerError(
                f"cannot be rendered, because no child process can be started ({failure})"
            ) from None
        self._stop = weakref.finalize(self, _end, self._process, os.getpid())
        setup = {
            "path": [path for path in sys.path if path],
            "memory": MEMORY_BYTES,
            "seconds": CPU_SECONDS,
            "characters": MAX_CHARACTERS,
        }
        self._write(json.dumps(setup))
        reply = self._read()
        if reply:
            raise _WorkerError(
                f"needs Jinja, which cannot be imported ({reply.get('message')}); "
                "run pip install 'jinja2>=3.1.6'"
            )

    def _write(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None

    def _read(self) -> dict[str, Any]:
        """Reads the next reply."""
        if b"\n" not in self._buffer:
            self._buffer += self._receive()
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _receive(self) -> bytes:
        """Reads from the process until a line ends."""
        assert self._process is not None
        assert self._process.stdout is not None
        file = self._process.stdout.fileno()
        pieces, size = [b""], 0
        deadline = time.monotonic() + WALL_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(file, selectors.EVENT_READ)
            while b"\n" not in pieces[-1]:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise _WorkerError(f"gave no result within {WALL_SECONDS:g} seconds")
                pieces.append(os.read(file, 1 << 16))
                size += len(pieces[-1])
                # An escaped character has up to 12 bytes.
                if not pieces[-1] or size > 13 * MAX_CHARACTERS:
                    raise self._ended()
        return b"".join(pieces)

    def _ended(self) -> _WorkerError:
        """Returns the reason why the process ended without a reply."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return _WorkerError("broke the protocol of the process that renders it")
        if code == -getattr(signal, "SIGPROF", 0):
            return _WorkerError(f"did not finish within {CPU_SECONDS:g} seconds of CPU time")
        if code < 0:
            with contextlib.suppress(ValueError):
                return _WorkerError(f"crashed with {signal.Signals(-code).name}")
        return _WorkerError(f"ended the process that renders it with exit code {code}")


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kills the worker, unless this is a fork of the process that started it."""
    if os.getpid() != owner:
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # type: ignore[union-attr]
    process.wait()


def _explain(reply: Mapping[str, Any]) -> str:
    match reply.get("error"):
        case "refused":
            return f"rejects the chat: {reply.get('message')}"
        case "memory":
            return f"needs more than {MEMORY_BYTES:,} bytes of memory"
        case "output":
            return f"writes more than {MAX_CHARACTERS:,} characters"
    return f"fails with {reply.get('type')}: {reply.get('message')}"


def _plain(value: Any) -> Any:
    """Converts a value that JSON does not support, in the way of transformers 5.23."""
    if isinstance(value, Mapping):
        return dict(value)
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    return f"<{type(value).__name__}>"


def _reset() -> None:
    """Gives a forked process its own worker."""
    global _lock, _worker
    _inherited.append(_worker)
    _lock, _worker = threading.Lock(), _Worker()


_lock = threading.Lock()
_worker = _Worker()
_inherited: list[_Worker] = []  # keeps workers alive whose processes belong to the parent
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
