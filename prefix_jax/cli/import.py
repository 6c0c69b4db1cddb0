"""Make a prefix of an adapter of Hugging Face PEFT.

It computes here what it computes there: docs/from_peft.md. A multitask prompt becomes one prefix a
task, OUTPUT/task-0 and so on, unless --task picks one.

  prefix-jax import adapter mine data.input="{text}" "task.labels=[bad, good]"

An adapter does not tell how records become text, nor the names of labels; what stands behind it
does, by the keys of a config.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The adapter, the prefix to write, and the backbone."""
    parser.add_argument("adapter", help="the directory that PeftModel.save_pretrained wrote")
    parser.add_argument("output", help="the directory to write")
    parser.add_argument(
        "settings",
        metavar="key.path=value",
        nargs="*",
        help="how records become text, data.input={text}, and the names of labels",
    )
    parser.add_argument("--model", help="the backbone (default: the one that the adapter names)")
    parser.add_argument("--task", type=int, help="a task of a multitask prompt, counted from 0")
    parser.add_argument(
        "--to",
        choices=("orbax", "safetensors"),
        default="orbax",
        help="the container of the arrays (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the prefixes and says what they are."""
    from prefix_jax import artifact, config
    from prefix_jax.errors import PrefixError
    from prefix_jax.interop.peft import ImportConfig, import_peft, tasks_of
    from prefix_jax.terminal.console import make_console

    settings = config.sections(ImportConfig, {}, args.settings)

    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PrefixError(f"{output} exists already; choose another directory, or remove it")
    tasks = tasks_of(args.adapter)
    places = {args.task: output}
    if tasks is not None and args.task is None:
        places = {task: output / f"task-{task}" for task in range(tasks)}
    model = args.model
    console = make_console(soft_wrap=True, highlight=False, markup=False)
    for task, place in places.items():
        imported = import_peft(args.adapter, model, task=task, settings=settings)
        model, card = imported.pretrained, imported.card
        artifact.save(place, imported.produced, card, args.to, imported.head)
        console.print(
            f"{place}: {card.length} slots of kind {card.kind!r}, {card.init}, for "
            f"{card.backbone.source}; text starts at position {card.offset}"
        )
    return 0
