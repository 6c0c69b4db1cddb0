"""Answer records with a prefix and its head: labels, numbers, tags, spans or choices.

  prefix-jax predict runs/sst2 --input test.jsonl --output answers.jsonl

Records are read as in the training run, and need not hold answers. A line of
the output has the input, the answer and the probabilities of the labels.
"""

from __future__ import annotations

import argparse
import os

from prefix_jax.cli import _stored
from prefix_jax.errors import DataError
from prefix_jax.terminal import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The prefix, the records and where answers go."""
    _stored.add_arguments(parser, "evaluate.batch_size=64")
    parser.add_argument(
        "--input",
        metavar="FILE",
        required=True,
        help="records: a .jsonl, .csv or .parquet file, tfds:NAME/SPLIT",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where the answers go, as JSON lines (default: the terminal, one a line)",
    )


def run(args: argparse.Namespace) -> int:
    """Answers, to the terminal or to a file."""
    from prefix_jax.config import MeasureConfig
    from prefix_jax.terminal.console import make_console

    if args.output is not None and os.path.realpath(args.output) == os.path.realpath(args.input):
        raise DataError(f"--output would replace the records in {args.input}; choose another file")
    progress = make_console(stderr=True, highlight=False)
    with progress.status("loading"):
        tuned, settings = _stored.load(args, MeasureConfig)
    with progress.status("answering"):
        made = tuned.answers(
            args.input, batch_size=settings.evaluate.batch_size, output=args.output
        )
    if args.output is None:
        for one in made:
            print(printable(one.prediction))
    else:
        progress.print(f"{len(made)} answers in {args.output}", markup=False, soft_wrap=True)
    return 0
