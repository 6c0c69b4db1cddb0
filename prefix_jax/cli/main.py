"""The `prefix-jax` command: finds the verb's module and turns errors into one line and a code.

Every public module in this folder but this one is a verb. It has a docstring whose first line is
its help, `add_arguments(parser)` and `run(args) -> int` (the exit code), and imports what is heavy
inside `run`, so that `prefix-jax --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import pkgutil
import sys
from collections.abc import Sequence

import prefix_jax.cli
from prefix_jax.errors import PrefixJaxError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Codes: 0 success; 1 the verb found what it looks for wanting; 2 the input's fault, told on
    stderr; 130 interrupted; 141 the reader of a pipe went away.
    """
    args = _parser().parse_args(argv)
    _quieten()
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except PrefixJaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefix-jax", description="Prefix tuning of pretrained language models in JAX."
    )
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


def _quieten() -> None:
    """Mutes the libraries' notices: what a user must know, we say."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("absl", "jax", "orbax"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
