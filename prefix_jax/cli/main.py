"""Entry point of `prefix-jax`: dispatches to a command and turns errors into exit codes.

Every other public module in this folder is a command. Its docstring is its help,
`add_arguments(parser)` declares its arguments, and `run(args) -> int` returns the exit code. Heavy
imports belong inside `run`, so that `prefix-jax --help` is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import logging
import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import prefix_jax.cli
from prefix_jax.cli import _failures, _processes, _usage
from prefix_jax.errors import ConfigError, PrefixJaxError
from prefix_jax.terminal import print_error, streams


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Exit codes: 0 success; 1 the command reports a problem, such as a step that does not fit; 2 an
    error of the input or the machine, with one message on stderr; 130 interrupted; 141 the reader
    of a pipe has closed it; 143 terminated, after saving. Any other exception is a bug and
    propagates.

    Args:
        argv: the arguments. None reads them from `sys.argv` and also replaces the process's
            handlers for interrupts and uncaught exceptions.
    """
    streams.prepare()
    if argv is None:
        _failures.prepare_process()
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except PrefixJaxError as error:
        return _end(2, str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _processes.exit_now(130)
        return 130
    except BrokenPipeError:
        streams.discard_stdout()
        return 141
    except Exception as error:
        message = _failures.describe(error)
        if message is not None:
            streams.discard_stdout()
            return _end(2, message)
        error.add_note(_failures.REPORT)
        _processes.exit_now(1, f"{traceback.format_exc()}{_processes.CANNOT_CONTINUE}")
        raise
    finally:
        if argv is None:
            _failures.restore_default_interrupt()


def _run(argv: Sequence[str]) -> int:
    try:
        args = _parse(argv)
    except SystemExit:
        sys.stdout.flush()
        raise
    try:
        Path.cwd()
    except OSError as error:
        raise ConfigError(
            f"the current directory cannot be used ({error.strerror}); change to another one"
        ) from None
    _silence_libraries()
    _set_missing_home()
    _enable_compilation_cache()
    _processes.initialize(args)
    code: int = args.run(args)
    sys.stdout.flush()
    return code


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    return _usage.parse(_parser(), _commands(), argv)


def _end(code: int, message: str) -> int:
    # Flush first, so that a log shows the output before the error.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    print_error(message)
    _processes.exit_now(code)
    return code


def _commands() -> list[str]:
    names = (info.name for info in pkgutil.iter_modules(prefix_jax.cli.__path__))
    return [name for name in names if not name.startswith("_") and name != "main"]


def _parser() -> _usage.Parser:
    parser = _usage.Parser(
        prog="prefix-jax",
        description="Prefix tuning of pretrained language models in JAX.",
        epilog="Run 'prefix-jax COMMAND --help' for the options of a command.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    subparsers = parser.add_subparsers(required=True, title="commands", metavar="COMMAND")
    for name in _commands():
        module = importlib.import_module(f"prefix_jax.cli.{name}")
        description = module.__doc__ or ""
        subparser = subparsers.add_parser(
            name,
            help=description.partition("\n")[0].rstrip("."),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run, parser=subparser)
    return parser


class _Version(argparse.Action):
    """Prints the version; looks it up only when the option is given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        try:
            print("prefix-jax", importlib.metadata.version("prefix-jax"))
        except importlib.metadata.PackageNotFoundError:
            print("prefix-jax (not installed)")
        parser.exit()


def _set_missing_home() -> None:
    """Sets HOME for users without a home directory, as in some containers.

    Several libraries look it up on import and fail in different ways without one. The directory
    does not exist, so nothing is read from it or written to it.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/nonexistent"


def _enable_compilation_cache() -> None:
    """Turns on JAX's persistent compilation cache, so that later commands start quickly.

    JAX's own environment variables take precedence. Call this before JAX is imported.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "prefix_jax" / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):  # otherwise JAX would warn at every compilation
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def _silence_libraries() -> None:
    """Turns off the libraries' notices and ignores JAX_ENABLE_X64."""
    # Models compute in at most 32 bits; 64-bit defaults would cause dtype mismatches.
    os.environ.pop("JAX_ENABLE_X64", None)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("absl", "jax", "matplotlib", "orbax"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
