"""Measure a prefix on held-out records.

  prefix-jax evaluate runs/quickstart --data test.jsonl --metrics loss,bleu

Records are rendered, cut and decoded as in the training run, unless a setting
says otherwise: decode.beams=5, evaluate.limit=100, evaluate.batch_size=32,
evaluate.before=true (measures the bare model too).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prefix_jax.cli import _processes, _stored
from prefix_jax.errors import ConfigError

if TYPE_CHECKING:
    from prefix_jax.evaluate.run import Evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The prefix, the data, what to measure and where to write it."""
    _stored.add_arguments(parser, "decode.beams=5, evaluate.limit=100, evaluate.before=true")
    parser.add_argument(
        "--data",
        metavar="FILE",
        required=True,
        help="a .jsonl, .csv or .parquet file, or tfds:NAME/SPLIT",
    )
    parser.add_argument(
        "--metrics",
        metavar="NAME,…",
        help="loss, accuracy, bleu, chrf, rouge1, rouge2, rougeL, rougeLsum, exact_match, "
        "final_number; of a task with labels loss, accuracy, f1, f1_macro, matthews, pearson, "
        "spearman, exact_match: "
        "short for evaluate.metrics=[…] (default: loss)",
    )
    parser.add_argument(
        "--labels",
        metavar="TEXT,…",
        help="the answers among which accuracy chooses, short for evaluate.labels=[…]",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="write results.json and predictions.jsonl there"
    )
    parser.add_argument(
        "--official",
        metavar="DIR",
        help="write what the scripts of e2e-metrics, WebNLG and DART read there: hypotheses.txt, "
        "references.e2e.txt, reference0, … (takes a metric of generated text)",
    )
    _processes.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints a table, and writes the results if asked to."""
    from prefix_jax.config import MeasureConfig
    from prefix_jax.evaluate.official import write_official
    from prefix_jax.evaluate.report import make_directory
    from prefix_jax.evaluate.run import LIKELIHOOD_METRICS, needs_references
    from prefix_jax.runs.final_report import comparison
    from prefix_jax.terminal.console import make_console

    for key in ("metrics", "labels"):
        given = getattr(args, key)
        if given is not None:
            args.settings.append(f"evaluate.{key}={json.dumps(given.split(','))}")
    if args.output is not None:
        _refuse_foreign(Path(args.output))
    first = _processes.first()
    for place in (args.output, args.official):
        if place is not None and first:
            make_directory(place)
    progress = make_console(stderr=True, highlight=False, quiet=not first)
    with progress.status("loading"):
        tuned, settings = _stored.load(args, MeasureConfig)
        if args.official is not None and set(settings.evaluate.metrics) <= {*LIKELIHOOD_METRICS}:
            raise ConfigError(
                "--official writes generated text: ask for a metric of it, --metrics bleu say"
            )
        examples = tuned.examples(args.data, references=needs_references(settings.evaluate.metrics))
    for what, sources in (("cut to fit", examples.truncated), ("left out", examples.dropped)):
        if sources:
            progress.print(
                f"warning: {len(sources)} examples were {what} (first: {sources[0]})", markup=False
            )
    found = tuned.compare(examples, settings.evaluate, settings.decode, progress.status)
    if not first:
        return 0
    before, after = found.get("before"), found["after"]
    make_console(highlight=False).print(
        comparison({} if before is None else before.report.metrics, after.report.metrics)
    )
    if args.output is not None:
        _write(Path(args.output), args, found)
    if args.official is not None:
        write_official(args.official, after.predictions)
    return 0


def _refuse_foreign(directory: Path) -> None:
    """Makes sure that the results of another verb or program are not replaced.

    Raises:
        ConfigError: the directory contains some.
    """
    from prefix_jax.untrusted.json import read_json_object

    what = None
    if (directory / "config.yaml").exists():
        what = "a run"
    elif (directory / "prefix.json").exists():
        what = "a prefix"
    elif (results := directory / "results.json").exists():
        try:
            own = {"prefix", "data", "results"} <= read_json_object(results, ConfigError).keys()
        except ConfigError:
            own = False
        what = None if own else "a results.json of another program"
    elif found := sorted(directory.glob("predictions*.jsonl")):
        what = f"{found[0].name} of another program"
    if what is not None:
        raise ConfigError(
            f"--output {directory} holds {what}, which these results would replace or join; "
            "choose another directory"
        )


def _write(directory: Path, args: argparse.Namespace, found: Mapping[str, Evaluation]) -> None:
    from prefix_jax.evaluate.report import save_predictions
    from prefix_jax.runs.results import write_whole

    content = {"prefix": args.prefix, "data": args.data, "settings": args.settings}
    results = {name: evaluation.report.as_dict() for name, evaluation in found.items()}
    write_whole(
        directory / "results.json",
        json.dumps({**content, "results": results}, indent=2, ensure_ascii=False) + "\n",
    )
    for name, evaluation in found.items():
        if evaluation.predictions:
            suffix = "" if name == "after" else f"-{name}"
            save_predictions(directory / f"predictions{suffix}.jsonl", evaluation.predictions)
