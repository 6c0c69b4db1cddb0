"""The `prefix-jax` command: finds the verb's module and turns errors into one line and a code.

Every public module in this folder but this one is a verb. It has a docstring whose first line is
its help, `add_arguments(parser)` and `run(args) -> int` (the exit code), and imports what is heavy
inside `run`, so that `prefix-jax --help` answers at once.
"""

from __future__ import annotations

import argparse
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
from prefix_jax.cli import _processes
from prefix_jax.errors import PrefixJaxError
from prefix_jax.terminal import print_error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Codes: 0 success; 1 the verb found what it looks for wanting; 2 the input's fault, told on
    stderr; 130 interrupted; 141 the reader of a pipe went away; 143 terminated, after saving.
    """
    args = _parse(argv)
    _quieten()
    _keep_programs()
    try:
        _processes.join(args)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except PrefixJaxError as error:
        print_error(error)
        _processes.leave(2)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _processes.leave(130)
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:
        _processes.leave(1, f"{traceback.format_exc()}{_processes.ALONE}")
        raise


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Like `parse_args`, but settings (key.path=value) may stand before and after options alike."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "settings") or any(word.startswith("-") for word in rest):
        return parser.parse_args(argv)  # tells what is wrong
    args.settings += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefix-jax",
        description="Prefix tuning of pretrained language models in JAX.",
        epilog="prefix-jax VERB --help tells more about each.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for info in pkgutil.iter_modules(prefix_jax.cli.__path__):
        if info.name.startswith("_") or info.name == "main":
            continue
        module = importlib.import_module(f"prefix_jax.cli.{info.name}")
        description = module.__doc__ or ""
        verb = verbs.add_parser(
            info.name,
            help=description.partition("\n")[0].rstrip("."),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser


class _Version(argparse.Action):
    """Looks the version up when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        try:
            print("prefix-jax", importlib.metadata.version("prefix-jax"))
        except importlib.metadata.PackageNotFoundError:
            print("prefix-jax, not installed")
        parser.exit()


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
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("absl", "jax", "orbax"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
