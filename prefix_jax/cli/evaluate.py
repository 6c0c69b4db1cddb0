"""Evaluate a prefix on held-out records.

  prefix-jax evaluate runs/quickstart --data test.jsonl --metrics loss,bleu

Templates, truncation and decoding are those of the training run. Settings
override them: decode.num_beams=5, evaluate.max_examples=100,
evaluate.batch_size=32, evaluate.compare_baseline=true (also evaluates the model
without the prefix).
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
    from prefix_jax.evaluate.evaluator import Evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the prefix, the data, the metrics and the outputs."""
    _stored.add_arguments(
        parser, "decode.num_beams=5, evaluate.max_examples=100, evaluate.compare_baseline=true"
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        required=True,
        help="a .jsonl, .csv or .parquet file, or tfds:NAME/SPLIT",
    )
    parser.add_argument(
        "--metrics",
        metavar="NAME,…",
        help="text: loss, accuracy, bleu, chrf, rouge1, rouge2, rougeL, rougeLsum, exact_match, "
        "final_number; tasks with a head: loss, accuracy, f1, f1_macro, matthews, pearson, "
        "spearman, exact_match, ndcg, mrr (default: loss). Short for evaluate.metrics=[…]",
    )
    parser.add_argument(
        "--labels",
        metavar="TEXT,…",
        help="candidate answers that accuracy compares; short for evaluate.labels=[…]",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="directory for results.json and predictions.jsonl"
    )
    parser.add_argument(
        "--official",
        metavar="DIR",
        help="directory for hypotheses.txt, references.e2e.txt, reference0, …: the input files of "
        "the e2e-metrics, WebNLG and DART scripts (needs a generation metric, such as bleu)",
    )
    _processes.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints a table of metrics and writes the requested files."""
    from prefix_jax.config import MeasureConfig
    from prefix_jax.evaluate.challenge_files import write_challenge_files
    from prefix_jax.evaluate.evaluator import needs_references
    from prefix_jax.evaluate.report import make_directory
    from prefix_jax.runs.final_report import comparison
    from prefix_jax.tasks import check_metrics
    from prefix_jax.terminal.console import make_console

    for key in ("metrics", "labels"):
        given = getattr(args, key)
        if given is not None:
            args.settings.append(f"evaluate.{key}={json.dumps(given.split(','))}")
    if args.output is not None:
        _check_output(Path(args.output))
    is_first = _processes.is_first()
    for directory in (args.output, args.official):
        if directory is not None and is_first:
            make_directory(directory)
    progress = make_console(stderr=True, highlight=False, quiet=not is_first)
    with progress.status("loading"):
        tuned, settings = _stored.load(args, MeasureConfig)
        check_metrics(tuned.task, settings.evaluate)
        reads = {tuned.task.metrics[name].reads for name in settings.evaluate.metrics}
        if args.official is not None and "text" not in reads:
            raise ConfigError(
                "--official needs generated text; add a generation metric, such as --metrics bleu"
            )
        examples = tuned.examples(args.data, references=needs_references(settings.evaluate.metrics))
    for effect, sources in (("truncated", examples.truncated), ("dropped", examples.dropped)):
        if sources:
            progress.print(
                f"warning: {len(sources)} examples were {effect} (first: {sources[0]})",
                markup=False,
            )
    after = tuned.evaluate(
        examples, settings=settings.evaluate, decode=settings.decode, phase=progress.status
    )
    if not is_first:
        return 0
    before = after.baseline
    make_console(highlight=False).print(
        comparison({} if before is None else before.report.metrics, after.report.metrics)
    )
    if args.output is not None:
        evaluations = {"after": after} if before is None else {"before": before, "after": after}
        _write(Path(args.output), args, evaluations)
    if args.official is not None:
        write_challenge_files(args.official, after.predictions)
    return 0


def _check_output(directory: Path) -> None:
    """Checks that the directory holds no files of other commands or programs.

    Raises:
        ConfigError: writing the results there would replace such files or mix with them.
    """
    from prefix_jax.untrusted.json import read_json_object

    content = None
    if (directory / "config.yaml").exists():
        content = "a run"
    elif (directory / "prefix.json").exists():
        content = "a prefix"
    elif (results := directory / "results.json").exists():
        try:
            ours = {"prefix", "data", "results"} <= read_json_object(results, ConfigError).keys()
        except ConfigError:
            ours = False
        content = None if ours else "a results.json of another program"
    elif predictions := sorted(directory.glob("predictions*.jsonl")):
        content = f"{predictions[0].name} of another program"
    if content is not None:
        raise ConfigError(
            f"--output: {directory} contains {content}; choose another directory for the results"
        )


def _write(
    directory: Path, args: argparse.Namespace, evaluations: Mapping[str, Evaluation]
) -> None:
    from prefix_jax.evaluate.predictions import save_predictions
    from prefix_jax.runs.results import write_atomically

    content = {"prefix": args.prefix, "data": args.data, "settings": args.settings}
    results = {name: evaluation.report.as_dict() for name, evaluation in evaluations.items()}
    write_atomically(
        directory / "results.json",
        json.dumps({**content, "results": results}, indent=2, ensure_ascii=False) + "\n",
    )
    for name, evaluation in evaluations.items():
        if evaluation.predictions:
            suffix = "" if name == "after" else f"-{name}"
            save_predictions(directory / f"predictions{suffix}.jsonl", evaluation.predictions)
