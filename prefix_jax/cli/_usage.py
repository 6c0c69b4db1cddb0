"""Argument parsing with messages that name the nearest verb, option or setting."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from prefix_jax.errors import ConfigError
from prefix_jax.terminal import escape, print_error

_CONFIGS = (".yaml", ".yml")


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong argument in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        print_error(f"{message}; see '{self.prog} --help'")
        self.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        # Argparse drops errors here; `main` reports that standard output is full.
        file = sys.stderr if file is None else file
        if message and file is not None:
            file.write(escape(message))


def parse(parser: Parser, verbs: Sequence[str], words: Sequence[str]) -> argparse.Namespace:
    """Like `parse_args`, but settings (key.path=value) may also follow options.

    Args:
        parser: has one subparser per verb, each with itself as its default of `parser`.
        verbs: the names of the subparsers.
        words: the command line, without the program.

    Raises:
        ConfigError: there is more than one config or prefix.
        SystemExit: the other mistakes, and --help.
    """
    if not words:
        parser.print_help(sys.stderr)
        parser.exit(2)
    verb = next((word for word in words if not word.startswith("-")), None)
    if verb is not None and verb not in verbs:
        print_error(f"unknown verb {verb!r}{_verb_meant(verb, verbs)}")
        sys.stderr.write("\n")
        parser.print_help(sys.stderr)
        parser.exit(2)
    args, rest = parser.parse_known_args(words)
    used: Parser = args.parser
    has_settings = "settings" in args
    unknown = [word for word in rest if word.startswith("-") or not has_settings]
    if unknown:
        used.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(used, unknown[0], words)}")
    if has_settings:
        args.settings += rest
        _check_settings(args, verb or "")
    return args


def whole_number(example: str) -> Any:
    """Makes the type of an option whose value may be left out: a later word is not its value.

    Args:
        example: the option with a value, for the message: "--profile=5".
    """

    def convert(word: str) -> int:
        try:
            return int(word)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected a whole number, got {word!r}; write {example}, or put the option last"
            ) from None

    return convert


def nearest(word: str, known: Iterable[str]) -> str:
    """Names the known word that is most alike, as " (did you mean …?)", or nothing."""
    found = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {found[0]}?)" if found else ""


def _verb_meant(word: str, verbs: Sequence[str]) -> str:
    if word.endswith(_CONFIGS):
        return f" (did you mean 'prefix-jax train {word}'?)"
    return nearest(word, verbs)


def _meant(parser: Parser, word: str, words: Sequence[str]) -> str:
    name, equals, value = word.lstrip("-").partition("=")
    options = [option for option in parser._option_string_actions if option.startswith("--")]
    option = word.partition("=")[0]
    meant = nearest(option, options)
    takes_settings = any(action.dest == "settings" for action in parser._actions)
    if takes_settings and re.fullmatch(r"[a-z_]+(\.\w+)*", name) and (equals or "." in name):
        following = words[words.index(word) + 1 :] if word in words else ()
        setting = f"{name}={value if equals else (*following, '…')[0]}"
        # An option with a typo and a setting with dashes look alike without a dot.
        if "." in name or not meant:
            return f"; settings have no dashes, write {setting}"
    return meant


def _check_settings(args: argparse.Namespace, verb: str) -> None:
    files = [word for word in args.settings if "=" not in word and _is_file(word)]
    first = getattr(args, "config", None) or getattr(args, "prefix", None)
    if first is not None:
        files.insert(0, first)
    if len(files) > 1:
        what = "CONFIG" if first is None or "config" in args else "PREFIX"
        raise ConfigError(
            f"{verb}: expected one {what}, got {', '.join(map(repr, files))}; write what differs "
            "as key.path=value"
        )


def _is_file(word: str) -> bool:
    try:
        return word.endswith(_CONFIGS) or Path(word).exists()
    except (OSError, ValueError):
        return False
