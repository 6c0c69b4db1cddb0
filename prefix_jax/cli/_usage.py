"""Argument parsing whose errors suggest the nearest command, option or setting."""

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
    """An argument parser that reports mistakes in one line, like all other errors."""

    def error(self, message: str) -> NoReturn:
        print_error(f"{message}; see '{self.prog} --help'")
        self.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        # Argparse ignores write errors; here they reach `main`, which reports a full disk.
        file = sys.stderr if file is None else file
        if message and file is not None:
            file.write(escape(message))


def parse(parser: Parser, commands: Sequence[str], words: Sequence[str]) -> argparse.Namespace:
    """Parses like `parse_args`, but settings (key.path=value) may also follow options.

    Args:
        parser: has one subparser per command; each sets itself as the default of `parser`.
        commands: the names of the subparsers.
        words: the command line, without the program.

    Raises:
        ConfigError: more than one config or prefix is given.
        SystemExit: any other mistake, or --help.
    """
    if not words:
        parser.print_help(sys.stderr)
        parser.exit(2)
    command = next((word for word in words if not word.startswith("-")), None)
    if command is not None and command not in commands:
        print_error(f"unknown command {command!r}{_nearest_command(command, commands)}")
        sys.stderr.write("\n")
        parser.print_help(sys.stderr)
        parser.exit(2)
    args, rest = parser.parse_known_args(words)
    used: Parser = args.parser
    has_settings = "settings" in args
    unknown = [word for word in rest if word.startswith("-") or not has_settings]
    if unknown:
        used.error(f"unrecognized arguments: {' '.join(unknown)}{_hint(used, unknown[0], words)}")
    if has_settings:
        args.settings += rest
        _check_settings(args, command or "")
    return args


def whole_number(example: str) -> Any:
    """Returns an argparse type for an option with an optional value.

    Without one, argparse takes the following word for the value; the error says how to avoid that.

    Args:
        example: the option with a value, for the error message: "--profile=5".
    """

    def convert(word: str) -> int:
        try:
            return int(word)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected an integer, got {word!r}; write {example}, or put the option last"
            ) from None

    return convert


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns " (did you mean …?)" with the most similar known word, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def _nearest_command(word: str, commands: Sequence[str]) -> str:
    if word.endswith(_CONFIGS):
        return f" (did you mean 'prefix-jax train {word}'?)"
    return nearest(word, commands)


def _hint(parser: Parser, word: str, words: Sequence[str]) -> str:
    name, equals, value = word.lstrip("-").partition("=")
    options = [option for option in parser._option_string_actions if option.startswith("--")]
    suggestion = nearest(word.partition("=")[0], options)
    has_settings = any(action.dest == "settings" for action in parser._actions)
    if has_settings and re.fullmatch(r"[a-z_]+(\.\w+)*", name) and (equals or "." in name):
        following = words[words.index(word) + 1 :] if word in words else ()
        setting = f"{name}={value if equals else (*following, '…')[0]}"
        # Without a dot, this may also be an option with a typo.
        if "." in name or not suggestion:
            return f"; settings have no dashes, write {setting}"
    return suggestion


def _check_settings(args: argparse.Namespace, command: str) -> None:
    files = [word for word in args.settings if "=" not in word and _is_file(word)]
    first = getattr(args, "config", None) or getattr(args, "prefix", None)
    if first is not None:
        files.insert(0, first)
    if len(files) > 1:
        argument = "CONFIG" if first is None or "config" in args else "PREFIX"
        raise ConfigError(
            f"{command}: expected one {argument}, got {', '.join(map(repr, files))}; write changes "
            "as key.path=value"
        )


def _is_file(word: str) -> bool:
    try:
        return word.endswith(_CONFIGS) or Path(word).exists()
    except (OSError, ValueError):
        return False


def named_directories(options: Sequence[str]) -> dict[str, str]:
    """Parses the options --prefix NAME=DIR to directories by name.

    Raises:
        ConfigError: an option has another form, or a name is given twice.
    """
    directories: dict[str, str] = {}
    for option in options:
        name, equals, directory = option.partition("=")
        if not (name and equals and directory):
            raise ConfigError(f"--prefix: expected NAME=DIR, got {option!r}")
        if name in directories:
            raise ConfigError(
                f"--prefix: the name {name!r} is given twice, for {directories[name]} and "
                f"{directory}; choose another name for one of them"
            )
        directories[name] = directory
    return directories
