"""Processes that start with JAX and the package imported.

Importing them costs three seconds of CPU time. A server imports them once, and forks every process
before JAX has a backend (`multiprocessing` calls this "forkserver").
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["prefix_jax.cli.train", "prefix_jax.runs.run", "pytest", "matplotlib.backends.backend_agg"]
)


class ForkedProcess:
    """A running process with the methods of `subprocess.Popen` that the tests use.

    Args:
        target: called in the process; its result is the exit code. A function of a helper module
            in `tests/`, because the process imports it by name.
        arguments: of `target`.
        env: added to the environment. The `JAX_…` variables that JAX reads when it is imported
            have no effect.
        cwd: the working directory.

    Attributes:
        stdout, stderr: streams to read.
        pid: its process id.
    """

    def __init__(
        self,
        target: Callable[..., int | None],
        *arguments: Any,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        out, child_out = _CONTEXT.Pipe(duplex=False)
        err, child_err = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(
            target=_run,
            args=(target, arguments, dict(os.environ) | dict(env or {}), cwd, child_out, child_err),
            daemon=True,  # ends with the tests
        )
        self._process.start()
        child_out.close()
        child_err.close()
        self.stdout, self.stderr = _stream(out), _stream(err)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or the negative number of the signal that ended it; None if it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """Sends SIGKILL."""
        self._process.kill()

    def send_signal(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Returns the rest of both streams when the process has ended.

        Raises:
            subprocess.TimeoutExpired: it did not end in time, and was killed.
        """
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.kill()

        timer = threading.Timer(timeout or threading.TIMEOUT_MAX, expire)
        timer.daemon = True
        timer.start()
        with self.stdout, self.stderr:
            streams = self.stdout.read(), self.stderr.read()
        self._process.join()
        timer.cancel()
        if expired.is_set():
            raise subprocess.TimeoutExpired(str(self._process.name), timeout or 0, *streams)
        return streams


def _stream(connection: Connection) -> Any:
    with connection:
        return os.fdopen(os.dup(connection.fileno()), encoding="utf-8")


def _run(
    target: Callable[..., int | None],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    cwd: Path | None,
    out: Connection,
    err: Connection,
) -> None:
    """Calls the target as if it were the process's program."""
    for number, connection in ((1, out), (2, err)):
        os.dup2(connection.fileno(), number)
        connection.close()
    # Those of the server remember what kind of file it has.
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd or ".")
    code = 1
    try:
        code = target(*arguments) or 0
    finally:
        # `multiprocessing` leaves out the functions that run at exit, such as those of JAX.
        atexit._run_exitfuncs()
        sys.stdout.flush()
    raise SystemExit(code)
