"""Export a prefix as safetensors, Orbax or a PEFT adapter, or for vLLM.

  prefix-jax export runs/quickstart exported --bake
  prefix-jax export runs/quickstart adapter --to peft
  prefix-jax export runs/quickstart served/stations --to vllm

The output can be read without prefix_jax (docs/export.md). With --to peft it is
an adapter for PeftModel.from_pretrained (docs/from_peft.md). With --to vllm, its
directory has what an unmodified vLLM needs to serve it (docs/serving.md).
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from prefix_jax.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the prefix, the output and its format."""
    parser.add_argument("prefix", metavar="PREFIX", help="directory of a prefix or a run")
    parser.add_argument("output", metavar="OUTPUT", help="directory to write")
    parser.add_argument(
        "--to",
        choices=("orbax", "safetensors", "peft", "vllm"),
        default="safetensors",
        help="output format (default: %(default)s)",
    )
    parser.add_argument(
        "--bake",
        action="store_true",
        help="compute the keys and values of soft tokens or hidden states, and export those",
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="the backbone, for --bake and --to vllm (default: as in training)",
    )
    parser.add_argument(
        "--replace", action="store_true", help="with --to vllm: replace a prefix of this name"
    )
    parser.add_argument(
        "--write-model",
        action="store_true",
        help="with --to vllm: also write a GGUF backbone to the directory 'model' next to OUTPUT, "
        "in the layout that vLLM reads",
    )
    parser.add_argument(
        "--allow-other-weights",
        action="store_true",
        help="accept a backbone with the same shapes but other weights, such as a quantised copy",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the output and prints a summary."""
    from prefix_jax import artifact
    from prefix_jax.interop.export import export
    from prefix_jax.interop.peft import export_peft
    from prefix_jax.terminal.console import make_console

    options = {"model": args.model, "allow_other_weights": args.allow_other_weights}
    if args.to == "vllm":
        return _run_vllm(args, **options)
    for option in ("replace", "write_model"):
        if getattr(args, option):
            name = option.replace("_", "-")
            raise ConfigError(f"--{name} requires --to vllm; add that, or remove --{name}")
    if args.to == "peft":
        config = export_peft(args.prefix, args.output, bake=args.bake, **options)
        content = f"{config['num_virtual_tokens']} slots as {config['peft_type']}"
        detail = f"for {config['task_type']}"
    else:
        card = export(args.prefix, args.output, args.to, bake=args.bake, **options)
        content = f"{card.length} slots of kind {card.kind!r} as {args.to}"
        detail = f"text starts at position {card.text_position}"
    make_console(soft_wrap=True, highlight=False, markup=False).print(
        f"{args.output}: {content}, {artifact.stored_bytes(args.output):,} bytes; {detail}"
    )
    return 0


def _run_vllm(args: argparse.Namespace, **options: Any) -> int:
    from prefix_jax import artifact
    from prefix_jax.interop.vllm import export_vllm
    from prefix_jax.interop.vllm.export import ARGUMENTS, MODEL, needs_conversion
    from prefix_jax.terminal.console import make_console

    card = export_vllm(
        args.prefix, args.output, replace=args.replace, write_model=args.write_model, **options
    )
    output = Path(args.output)
    directory, model = output.parent, args.model or card.backbone.source
    console = make_console(soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"{output}: {card.length} slots for vLLM, {artifact.stored_bytes(output):,} bytes"
    )
    if (directory / MODEL / "config.json").is_file():
        model = directory / MODEL
    elif needs_conversion(model):
        console.print(
            f"{model} is a GGUF file, which vLLM does not read; export with --write-model as well "
            "(and --replace), or serve a copy of the model in Hugging Face layout"
        )
        model = "MODEL"
    console.print(
        f"\nServe it, and ask it:\n"
        f"  PYTHONPATH={shlex.quote(str(directory))} vllm serve {shlex.quote(str(model))} "
        f"--config {shlex.quote(str(directory / ARGUMENTS))}\n"
        "  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\\n"
        f"""    -d '{{"model": "{output.name}", "prompt": "…", "max_tokens": 64}}'"""
    )
    return 0
