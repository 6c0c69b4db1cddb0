"""Import an adapter of Hugging Face PEFT as a prefix.

  prefix-jax import adapter imported data.input="{text}" "task.labels=[bad, good]"

Outputs equal those of PEFT (docs/from_peft.md). An adapter stores neither
templates nor label names; give them as config settings. A multitask prompt
becomes one prefix per task, OUTPUT/task-0 and so on; --task imports only one.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the adapter, the output and the backbone."""
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="directory written by PeftModel.save_pretrained"
    )
    parser.add_argument("output", metavar="OUTPUT", help="directory to write")
    parser.add_argument(
        "settings",
        metavar="key.path=value",
        nargs="*",
        default=[],
        help="templates and label names: data.input={text}, task.labels=[…]",
    )
    parser.add_argument(
        "--model", metavar="PATH", help="the backbone (default: the one named by the adapter)"
    )
    parser.add_argument(
        "--task", metavar="N", type=int, help="index of a task of a multitask prompt, from 0"
    )
    parser.add_argument(
        "--to",
        choices=("orbax", "safetensors"),
        default="orbax",
        help="storage format (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the prefixes and prints a summary of each."""
    from prefix_jax import artifact, config
    from prefix_jax.errors import PrefixError
    from prefix_jax.interop.peft import ImportConfig, import_peft, tasks_of
    from prefix_jax.terminal.console import make_console

    settings = config.sections(ImportConfig, {}, args.settings)

    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PrefixError(f"{output} already exists; choose another directory or remove it")
    tasks = tasks_of(args.adapter)
    directories = {args.task: output}
    if tasks is not None and args.task is None:
        directories = {task: output / f"task-{task}" for task in range(tasks)}
    model = args.model
    console = make_console(soft_wrap=True, highlight=False, markup=False)
    for task, directory in directories.items():
        imported = import_peft(args.adapter, model, task=task, settings=settings)
        model, card = imported.pretrained, imported.card
        artifact.save(directory, imported.produced, card, args.to, imported.head)
        console.print(
            f"{directory}: {card.length} slots of kind {card.kind!r}, {card.init}, for "
            f"{card.backbone.source}; text starts at position {card.text_position}"
        )
    return 0
