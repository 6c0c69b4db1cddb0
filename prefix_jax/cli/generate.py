"""Generate text with a prefix: for a prompt, a file of records, or interactively.

  prefix-jax generate runs/quickstart --record '{"facts": "name[Harrow Mill]"}'
  prefix-jax generate runs/quickstart --input test.jsonl --output written.jsonl
  prefix-jax generate runs/quickstart

A record has the fields of the training data and is rendered with the training
run's template; a prompt is used unchanged. Without either, the command asks for
one record after another: Ctrl-C stops an answer, Ctrl-D ends.

Several prefixes can share batches: with --prefix, the field "prefix" of a record
names the one that it uses, whose template renders it. Records without a name, or
with null, use the first argument, or with --no-prefix the bare model. The first
argument may also be a backbone; then every record names a prefix.

  prefix-jax generate runs/quickstart --prefix legal=runs/legal --input all.jsonl

Decoding settings are those of each prefix's training run; override them as in
decode.num_beams=5. Available are max_new_tokens, min_new_tokens, num_beams,
length_penalty, early_stopping, temperature, top_k, top_p, min_p,
repetition_penalty, no_repeat_ngram_size, banned_words, stop, num_samples, seed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prefix_jax.cli import _prefixes, _stored
from prefix_jax.errors import DataError, PrefixJaxError
from prefix_jax.terminal import escape, print_error, printable
from prefix_jax.untrusted.json import parse_json

if TYPE_CHECKING:
    from rich.console import Console

    from prefix_jax.api import Tuned
    from prefix_jax.config import DecodeConfig
    from prefix_jax.tasks import Prediction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the prefix, the prompts and the output."""
    _stored.add_arguments(parser, "decode.max_new_tokens=200, decode.num_beams=5, …")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="prompt text, used unchanged")
    source.add_argument("--record", metavar="JSON", help="fields of one record")
    source.add_argument(
        "--input", metavar="FILE", help="records: a .jsonl, .csv or .parquet file, tfds:NAME/SPLIT"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="JSON Lines file for the predictions of --input (default: standard output)",
    )
    parser.add_argument(
        "--prefix",
        metavar="NAME=DIR",
        dest="prefixes",
        action="append",
        default=[],
        help='another prefix, for records of --input whose field "prefix" is NAME; repeatable',
    )
    parser.add_argument(
        "--no-prefix",
        action="store_true",
        help="use the model without the prefix, for comparison; with --prefix, only for records "
        "that name no other prefix",
    )


def run(args: argparse.Namespace) -> int:
    """Generates text to standard output or a file."""
    from prefix_jax.config import GenerateConfig
    from prefix_jax.data.source import read_records
    from prefix_jax.terminal.console import make_console

    if args.output is not None and args.input is None:
        raise DataError("--output needs --input, whose predictions it receives; give both")
    if args.output is not None and os.path.realpath(args.output) == os.path.realpath(args.input):
        raise DataError(f"--output would overwrite the records in {args.input}; use another file")
    if args.prefixes and args.input is None:
        raise DataError("--prefix needs --input, whose records name their prefixes; give both")
    record = None if args.record is None else _record(args.record)
    progress = make_console(stderr=True, highlight=False)
    if args.prefixes:
        with progress.status("loading"):
            engine, records, names, total = _prefixes.load(args)
        predict = functools.partial(engine.predict, records, names)
        _file(predict, total, args.output, progress)
        return 0
    with progress.status("loading"):
        tuned, settings = _stored.load(args, GenerateConfig)
    if args.no_prefix:
        tuned = tuned.without_prefix()
    if args.input is not None:
        records = read_records(args.input)
        predict = functools.partial(tuned.predict, records, decode=settings.decode)
        _file(predict, len(records) * settings.decode.num_samples, args.output, progress)
    elif args.prompt is not None or record is not None:
        _answer(tuned, settings.decode, args.prompt if record is None else record, progress)
    else:
        _dialogue(tuned, settings.decode, progress)
    return 0


def _record(text: str) -> Mapping[str, Any]:
    record = parse_json(text, "--record", DataError, unique_keys=True)
    if not isinstance(record, dict):
        raise DataError('--record: expected an object such as \'{"field": "text"}\'')
    return record


def _answer(
    tuned: Tuned, decode: DecodeConfig, prompt: str | Mapping[str, Any], progress: Console
) -> None:
    """Prints the continuation of a prompt while it is generated."""
    if decode.num_samples > 1:
        with progress.status("generating"):
            generation = tuned.generate(prompt, decode=decode, details=True)
        for sample in generation.samples:
            print(printable(sample.text.strip()))
        return
    status = progress.status("generating")
    status.start()
    failed = False

    def on_text(_prompt: int, _sample: int, piece: str) -> None:
        status.stop()
        print(printable(piece), end="", flush=True)

    try:
        tuned.generate(prompt, decode=decode, on_text=on_text)
    except PrefixJaxError:
        failed = True
        raise
    finally:
        status.stop()
        if not failed:
            print()


def _file(
    predict: Callable[..., list[Prediction]], total: int, output: str | None, progress: Console
) -> None:
    """Writes predictions to a file or to standard output.

    Args:
        predict: `Tuned.predict` or `Engine.predict` with its records.
        total: the number of predictions.
        output: the file; None for standard output.
        progress: the console for the progress bar.
    """
    from rich.progress import Progress

    bar = Progress(console=progress, transient=True)
    task = bar.add_task("generating", total=total)

    def on_prediction(prediction: Prediction) -> None:
        if output is None:
            print(printable(prediction.prediction))
        bar.advance(task)

    # Without a terminal, the bar would still print an empty line.
    with bar if progress.is_terminal else contextlib.nullcontext():
        predictions = predict(output=output, on_prediction=on_prediction)
    if output is not None:
        progress.print(
            f"wrote {len(predictions)} predictions to {output}", markup=False, soft_wrap=True
        )


def _dialogue(tuned: Tuned, decode: DecodeConfig, progress: Console) -> None:
    """Answers prompts until the input ends."""
    if sys.stdin.isatty():
        progress.print("Ctrl-C stops an answer, Ctrl-D ends.", style="dim")
    for prompt in _read_prompts(tuned):
        try:
            _answer(tuned, decode, prompt, progress)
        except KeyboardInterrupt:
            continue
        except PrefixJaxError as error:
            print()  # an empty answer, so that line numbers in a pipe still match
            print_error(error)


def _read_prompts(tuned: Tuned) -> Iterator[str | Mapping[str, Any]]:
    """Reads records from standard input, or prompts if the prefix has no template."""
    form = tuned.task.form
    while True:
        values: list[str] = []
        try:
            if form is None:
                yield _read_line("prompt")
            else:
                for name in form:
                    values.append(_read_line(name))
                yield tuned.task.filled(values)
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            if sys.stdin.isatty():
                print(file=sys.stderr)
            elif values and form is not None:
                missing = ", ".join(form[len(values) :])
                raise DataError(
                    f"standard input ends inside a record, before {missing}; each record needs "
                    f"one line for each of {', '.join(form)}"
                ) from None
            return


def _read_line(name: str) -> str:
    """Reads one line from the terminal, with a prompt, or from a pipe."""
    try:
        if not sys.stdin.isatty():
            return input()
        importlib.import_module("readline")  # gives input() line editing
        return input(f"{escape(name)}> ")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"standard input: expected {error.encoding} text, got byte {byte:#x}"
        ) from None
