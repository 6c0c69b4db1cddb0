"""Predict labels, numbers, tags, spans or choices with a prefix and its head.

  prefix-jax predict runs/sst2 --input test.jsonl --output predictions.jsonl

Records have the fields of the training data; labels are not needed. Each line
of the output has the input, the prediction and the label probabilities.
"""

from __future__ import annotations

import argparse
import os

from prefix_jax.cli import _stored
from prefix_jax.errors import DataError, PrefixError
from prefix_jax.terminal import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the prefix, the records and the output."""
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
        help="JSON Lines file for the predictions (default: standard output, one per line)",
    )


def run(args: argparse.Namespace) -> int:
    """Predicts to standard output or a file."""
    from prefix_jax.config import MeasureConfig
    from prefix_jax.terminal.console import make_console

    if args.output is not None and os.path.realpath(args.output) == os.path.realpath(args.input):
        raise DataError(f"--output would overwrite the records in {args.input}; use another file")
    progress = make_console(stderr=True, highlight=False)
    with progress.status("loading"):
        tuned, settings = _stored.load(args, MeasureConfig)
    if tuned.head is None:
        raise PrefixError("this prefix has no head and generates text; use prefix-jax generate")
    with progress.status("predicting"):
        predictions = tuned.predict(
            args.input, batch_size=settings.evaluate.batch_size, output=args.output
        )
    if args.output is None:
        for prediction in predictions:
            print(printable(prediction.prediction))
    else:
        progress.print(
            f"wrote {len(predictions)} predictions to {args.output}", markup=False, soft_wrap=True
        )
    return 0
