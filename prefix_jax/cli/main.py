"""The `prefix-jax` command: finds the verb's module and turns errors into one line and a code.

Every public module in this folder but this one is a verb. It has a docstring whose first line is
its help, `add_arguments(parser)` and `run(args) -> int` (the exit code), and imports what is heavy
inside `run`, so that `prefix-jax --help` answers at once.
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

    Codes: 0 success; 1 the verb reports a problem, such as a step that does not fit; 2 an error of
    the input or the machine, in one message on stderr; 130 interrupted; 141 the reader of a pipe
    has left; 143 terminated, after saving. Other exceptions are bugs, and are raised.

    Args:
        argv: the arguments. If None, those of the process, which then belongs to the command: its
            handlers of interrupts and of uncaught exceptions are replaced.
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
        _processes.leave(130)
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
        _processes.leave(1, f"{traceback.format_exc()}{_processes.ALONE}")
        raise
    finally:
        if argv is None:
            _failures.leave_interrupts_to_the_system()


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
    _quieten()
    _provide_home()
    _keep_programs()
    _processes.join(args)
    code: int = args.run(args)
    sys.stdout.flush()
    return code


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    return _usage.parse(_parser(), _verbs(), argv)


def _end(code: int, message: str) -> int:
    # What was printed before the error comes before it in a log too.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    print_error(message)
    _processes.leave(code)
    return code


def _verbs() -> list[str]:
    names = (info.name for info in pkgutil.iter_modules(prefix_jax.cli.__path__))
    return [name for name in names if not name.startswith("_") and name != "main"]


def _parser() -> _usage.Parser:
    parser = _usage.Parser(
        prog="prefix-jax",
        description="Prefix tuning of pretrained language models in JAX.",
        epilog="prefix-jax VERB --help tells more about each.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name in _verbs():
        module = importlib.import_module(f"prefix_jax.cli.{name}")
        description = module.__doc__ or ""
        verb = verbs.add_parser(
            name,
            help=description.partition("\n")[0].rstrip("."),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run, parser=verb)
    return parser


class _Version(argparse.Action):
    """Looks the version up when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        try:
            print("prefix-jax", importlib.metadata.version("prefix-jax"))
        except importlib.metadata.PackageNotFoundError:
            print("prefix-jax, not installed")
        parser.exit()


def _provide_home() -> None:
    """Sets HOME for a user without a home directory, as in some containers.

    Libraries ask for it when they are imported, and raise different errors. The directory does not
    exist, so nothing is read from or written to it.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/nonexistent"


def _keep_programs() -> None:
    """Keeps compiled programs between commands, so that the second one starts at once.

    JAX's own environment variables say otherwise; it reads them when it is imported.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "prefix_jax" / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):  # else JAX would complain at every program
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def _quieten() -> None:
    """Mutes the libraries' notices: what a user must know, we say."""
    # Models compute in 32 bits and less; with 64-bit defaults their types would not match.
    os.environ.pop("JAX_ENABLE_X64", None)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("absl", "jax", "matplotlib", "orbax"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
