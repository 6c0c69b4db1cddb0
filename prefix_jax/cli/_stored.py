"""Arguments that several commands share, and loading of stored prefixes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from prefix_jax.api import Tuned

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """Adds the prefix, the backbone and the settings.

    Args:
        parser: the command's parser.
        example: example settings, for the help.
    """
    parser.add_argument("prefix", metavar="PREFIX", help="directory of a prefix or a run")
    parser.add_argument(
        "settings",
        metavar="key.path=value",
        nargs="*",
        default=[],
        help=f"overrides settings of the training run: {example}",
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="the backbone: a directory, a .gguf file or a hub id (default: as in training)",
    )
    parser.add_argument(
        "--allow-other-weights",
        action="store_true",
        help="accept a backbone with the same shapes but other weights, such as a quantised copy",
    )


def add_backbone(parser: argparse.ArgumentParser) -> None:
    """Adds a backbone and its dtype, for commands that begin without a prefix."""
    parser.add_argument(
        "model", metavar="MODEL", help="the backbone: a directory, a .gguf file or a hub id"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the backbone's weights (default: %(default)s)",
    )


def load(args: argparse.Namespace, settings: type[T]) -> tuple[Tuned, T]:
    """Loads the prefix and its backbone.

    Args:
        args: the parsed arguments.
        settings: a dataclass of the config sections that can be overridden, including `decode`.

    Returns:
        The tuned model, and the settings of its training run with the overrides applied.
    """
    from prefix_jax import api, artifact, config

    # Check the settings first: loading the backbone may take minutes.
    _, card = artifact.load(args.prefix)
    updated = config.sections(settings, {"decode": card.decode}, args.settings, args.prefix)
    tuned = api.load_prefix(args.prefix, args.model, allow_other_weights=args.allow_other_weights)
    return tuned, updated
