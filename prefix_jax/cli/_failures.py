"""One-line messages for failures of the machine: memory, disk, devices, installation."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from prefix_jax.errors import reason
from prefix_jax.terminal import escape

REPORT = (
    "This is a bug in prefix-jax. Please report it with this traceback, the command, and the "
    "output of 'prefix-jax doctor'."
)


def describe(error: BaseException) -> str | None:
    """Describes a failure of the machine; None if the error is a bug in this package."""
    if isinstance(error, MemoryError):
        detail = f" ({reason(error)})" if str(error) else ""
        return f"the host is out of memory{detail}; {_SMALLER}"
    if isinstance(error, OSError):
        return _os_error(error)
    if isinstance(error, ImportError):
        if (error.name or "").partition(".")[0] == "prefix_jax":
            return None
        return f"{reason(error)}; 'prefix-jax doctor' shows which packages are missing or untested"
    if isinstance(error, ValueError) and error.__traceback__ is not None:
        innermost = traceback.extract_tb(error.__traceback__)[-1]
        if Path(innermost.filename).as_posix().endswith("jax/_src/config.py"):
            return (
                f"JAX rejected a JAX_… environment variable: {reason(error)}; correct or unset it"
            )
    if isinstance(error, RuntimeError):
        message = str(error)
        if "RESOURCE_EXHAUSTED" in message or "Out of memory" in message:
            return f"a device is out of memory ({reason(error)}); {_SMALLER}"
        if "nable to initialize backend" in message or "Unknown backend" in message:
            return f"JAX found no device: {reason(error)}"
    return None


def prepare_process() -> None:
    """Installs handlers for interrupts and uncaught exceptions in a process that only runs the CLI.

    An interrupt during an import ends the process immediately: extension modules turn
    `KeyboardInterrupt` into other errors, or crash. An interrupt that arrives where Python cannot
    raise it, such as in a callback of the garbage collector, is raised shortly afterwards instead
    of being lost. Tracebacks are escaped.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _raise_interrupts_later(sys.unraisablehook)
    sys.excepthook = _print_traceback


def restore_default_interrupt() -> None:
    """Makes Ctrl-C end the process without a traceback while the interpreter shuts down."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


_SMALLER = "use a smaller model, batch or length ('prefix-jax plan' computes the memory of a step)"


def _os_error(error: OSError) -> str:
    why = error.strerror or reason(error)
    if error.filename is not None:
        return f"{error.filename}: {why}"
    advice = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        advice = "; free disk space (standard output may be redirected to the full disk)"
    return f"cannot read or write: {why}{advice}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    innermost = frame
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os.write(2, b"interrupted\n")
            os._exit(130)
        frame = frame.f_back
    signal.default_int_handler(number, innermost)


def _raise_interrupts_later(previous: Callable[[Any], Any]) -> Callable[[Any], None]:
    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # Signal the main thread: a signal to another thread would not end its system call.
            thread = threading.main_thread().ident
            timer = threading.Timer(0.05, signal.pthread_kill, [thread, signal.SIGINT])
            timer.daemon = True
            timer.start()
        else:
            previous(unraisable)

    return hook


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    print(escape(text), end="", file=sys.stderr)
