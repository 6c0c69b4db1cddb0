"""What the verbs share that use a stored prefix: its arguments, and how it is loaded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from prefix_jax.api import Tuned

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """The prefix, its backbone, and settings.

    Args:
        parser: of the verb.
        example: of a setting, for the help.
    """
    parser.add_argument("prefix", metavar="PREFIX", help="the directory of a prefix or of a run")
    parser.add_argument(
        "settings",
        metavar="key.path=value",
        nargs="*",
        help=f"changes a setting of the training run: {example}",
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="the backbone: a directory, a .gguf file, a hub id (default: that of the training)",
    )
    parser.add_argument(
        "--allow-other-weights",
        action="store_true",
        help="accept a backbone of the same shape with other weights, such as a quantised copy",
    )


def load(args: argparse.Namespace, settings: type[T]) -> tuple[Tuned, T]:
    """Loads the prefix and its backbone.

    Args:
        args: as parsed.
        settings: a dataclass of the sections that may be set, `decode` among them.

    Returns:
        The prefix, and the settings: those of its training run, changed by the arguments.
    """
    from prefix_jax import api, artifact, config

    # What is wrong with the arguments shows before the backbone loads, which takes a while.
    _, card = artifact.load(args.prefix)
    changed = config.sections(settings, {"decode": card.decode}, args.settings, args.prefix)
    tuned = api.load_prefix(args.prefix, args.model, allow_other_weights=args.allow_other_weights)
    return tuned, changed
