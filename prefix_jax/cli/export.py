"""Copy a prefix into another container, bake it into plain keys and values, or hand it to PEFT.

What is written can be read without prefix_jax: docs/export.md shows how, in five lines. With
--to peft it is an adapter that PeftModel.from_pretrained loads: docs/from_peft.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The source, the copy, and what becomes of the prefix on the way."""
    parser.add_argument("prefix", help="the directory of a prefix or of a run")
    parser.add_argument("output", help="the directory to write")
    parser.add_argument(
        "--to",
        choices=("orbax", "safetensors", "peft"),
        default="safetensors",
        help="the container of the arrays, or an adapter of PEFT (default: %(default)s)",
    )
    parser.add_argument(
        "--bake",
        action="store_true",
        help="turn soft tokens or hidden states into the keys and values that they stand for",
    )
    parser.add_argument(
        "--model", help="the backbone, for --bake (default: the one of the training)"
    )
    parser.add_argument(
        "--allow-other-weights",
        action="store_true",
        help="accept a backbone of the same shape with other weights, such as a quantised copy",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the copy and says what is in it."""
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
        kind, task = config["peft_type"], config["task_type"]
        what, start = f"{config['num_virtual_tokens']} slots as {kind}", f"for {task}"
    else:
        card = export(args.prefix, args.output, args.to, **options)
        what = f"{card.length} slots of kind {card.kind!r} as {args.to}"
        start = f"text starts at position {card.offset}"
    size = sum(file.stat().st_size for file in Path(args.output).rglob("*") if file.is_file())
    make_console(soft_wrap=True, highlight=False, markup=False).print(
        f"{args.output}: {what}, {size:,} bytes; {start}"
    )
    return 0
