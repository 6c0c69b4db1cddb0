"""Export a prefix as safetensors, Orbax or a PEFT adapter.

  prefix-jax export runs/quickstart exported --bake
  prefix-jax export runs/quickstart adapter --to peft

The output can be read without prefix_jax (docs/export.md). With --to peft it is
an adapter for PeftModel.from_pretrained (docs/from_peft.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the prefix, the output and its format."""
    parser.add_argument("prefix", metavar="PREFIX", help="directory of a prefix or a run")
    parser.add_argument("output", metavar="OUTPUT", help="directory to write")
    parser.add_argument(
        "--to",
        choices=("orbax", "safetensors", "peft"),
        default="safetensors",
        help="output format (default: %(default)s)",
    )
    parser.add_argument(
        "--bake",
        action="store_true",
        help="compute the keys and values of soft tokens or hidden states, and export those",
    )
    parser.add_argument(
        "--model", metavar="PATH", help="the backbone, for --bake (default: as in training)"
    )
    parser.add_argument(
        "--allow-other-weights",
        action="store_true",
        help="accept a backbone with the same shapes but other weights, such as a quantised copy",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the output and prints a summary."""
    from prefix_jax.interop.export import export
    from prefix_jax.interop.peft import export_peft
    from prefix_jax.terminal.console import make_console

    options = {
        "bake": args.bake,
        "model": args.model,
        "allow_other_weights": args.allow_other_weights,
    }
    if args.to == "peft":
        config = export_peft(args.prefix, args.output, **options)
        content = f"{config['num_virtual_tokens']} slots as {config['peft_type']}"
        detail = f"for {config['task_type']}"
    else:
        card = export(args.prefix, args.output, args.to, **options)
        content = f"{card.length} slots of kind {card.kind!r} as {args.to}"
        detail = f"text starts at position {card.text_position}"
    size = sum(file.stat().st_size for file in Path(args.output).rglob("*") if file.is_file())
    make_console(soft_wrap=True, highlight=False, markup=False).print(
        f"{args.output}: {content}, {size:,} bytes; {detail}"
    )
    return 0
