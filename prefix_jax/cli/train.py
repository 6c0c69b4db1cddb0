"""Train a prefix, or resume an interrupted run.

  prefix-jax train configs/quickstart.yaml train.steps=500 method.length=32

Settings after the config override it. The same command resumes an interrupted
run, and shows the results of a finished one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefix_jax.cli import _processes, _usage

if TYPE_CHECKING:
    from prefix_jax.config import DataConfig
    from prefix_jax.evaluate.evaluator import Evaluation
    from prefix_jax.runs.final_report import Sample
    from prefix_jax.runs.results import Results
    from prefix_jax.tasks import Task

_SAMPLES = 3
_MAX_RECORD = 500  # characters; a longer record would make the printed command unreadable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the config and its overrides."""
    parser.add_argument(
        "config", metavar="CONFIG", help="a YAML file, such as configs/quickstart.yaml"
    )
    parser.add_argument(
        "settings",
        metavar="key.path=value",
        nargs="*",
        default=[],
        help="overrides the config: train.steps=500, data.train=mine.jsonl",
    )
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        nargs="?",
        type=_usage.whole_number("--profile=5"),
        const=5,
        help="trace this many steps for XProf (default: 5); short for train.profile_steps=5",
    )
    _processes.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Trains and prints the results. Returns 128 + the signal number if a signal stopped it."""
    from prefix_jax import config as configs
    from prefix_jax.mesh import agreed, describe
    from prefix_jax.runs.results import Results, config_digest, read_results
    from prefix_jax.runs.run import run as train
    from prefix_jax.runs.run_directory import RunDirectory
    from prefix_jax.tasks import make_task
    from prefix_jax.terminal.console import make_console

    if args.profile is not None:
        args.settings.append(f"train.profile_steps={args.profile}")
    config = configs.load(args.config, args.settings)
    console = make_console(highlight=False)
    output = RunDirectory(config.output_dir)
    output.fetch()
    directory = output.directory
    results = read_results(directory, config_digest(config)) if _processes.is_first() else None
    if agreed(results is not None):
        if results is not None:
            console.print(
                f"The run in {config.output_dir} has finished; these are its results. To train "
                "again, remove that directory or choose another with output_dir=…",
                markup=False,
            )
    else:
        if config.mesh.auto:
            from prefix_jax.plan.auto import settle

            with console.status("choosing the mesh"):
                config = settle(config)
            console.print(f"mesh: {describe(config.mesh.sizes)}", markup=False)
        try:
            result = train(config, console=console)
        except KeyboardInterrupt:
            print(
                "interrupted; the same command resumes from the last checkpoint, if there is one",
                file=sys.stderr,
            )
            _processes.exit_now(128 + signal.SIGINT)
            return 128 + signal.SIGINT
        if result.interrupted is not None:
            return 128 + result.interrupted
        results = Results(result.step, result.evaluations)
    if results is not None and _processes.is_first():
        task = make_task(config.data, config.task)
        _print_results(console, directory, results, task, config.data)
    return 0


def _print_results(
    console: Any, directory: Path, results: Results, task: Task, data: DataConfig
) -> None:
    from prefix_jax.runs.final_report import print_final_report

    before, after = results.evaluations.get("before"), results.evaluations.get("after")
    print_final_report(
        console,
        before={} if before is None else before.report.metrics,
        after=_dev(directory, results.step) if after is None else after.report.metrics,
        samples=_samples(before, after, "generated" if task.generates else "answered"),
        written=_written(directory),
        command=_command(directory, task, data),
    )


def _dev(directory: Path, step: int) -> dict[str, float]:
    """Returns the dev metrics of a step; empty if there are none."""
    from prefix_jax.errors import CheckpointError
    from prefix_jax.runs.metric_writer import read_metrics

    # The run succeeded; damaged metrics only shorten the final report.
    with contextlib.suppress(CheckpointError):
        for line in read_metrics(directory):
            if line.get("kind") == "dev" and line["step"] == step:
                names = [name for name in line if name not in ("step", "kind", "time")]
                return {name: line[name] for name in names if line[name] is not None}
    return {}


def _samples(before: Evaluation | None, after: Evaluation | None, verb: str) -> list[Sample]:
    """Returns a few held-out examples with their predictions, which the model `verb`."""
    from prefix_jax.runs.final_report import Sample

    if after is None:
        return []
    without = {} if before is None else {p.origin: p.prediction for p in before.predictions}
    return [
        Sample(
            prediction.prompt,
            next(iter(prediction.references), ""),
            without.get(prediction.origin),
            prediction.prediction,
            verb,
        )
        for prediction in after.predictions[:_SAMPLES]
    ]


def _written(directory: Path) -> dict[str, str]:
    """Lists the outputs of the run, by name."""
    from prefix_jax import artifact

    names = {
        "prefix": "prefix",
        "prefixes": artifact.PREFIXES,
        "checkpoints": "checkpoints",
        "metrics": "metrics.jsonl",
        "results": "results.json",
        "predictions": "predictions.jsonl",
        "loss curve": "loss.png",
    }
    paths = {key: directory / name for key, name in names.items() if (directory / name).exists()}
    sizes = {"prefix": f" ({_size(paths['prefix'])})"} if "prefix" in paths else {}
    return {key: f"{path}{sizes.get(key, '')}" for key, path in paths.items()}


def _size(directory: Path) -> str:
    from prefix_jax import artifact

    return f"{artifact.stored_bytes(directory) / 1000:,.0f} kB"


def _command(directory: Path, task: Task, data: DataConfig) -> str | None:
    """Returns a command that uses the prefix on held-out data; None after full fine-tuning."""
    from prefix_jax import artifact
    from prefix_jax.errors import PrefixJaxError

    prefix = directory / "prefix"
    if not prefix.exists():
        # A mixture: use the first dataset.
        prefix = next(iter(sorted((directory / artifact.PREFIXES).glob("*"))), prefix)
    if not prefix.exists():
        return None
    source = data.test or data.dev or data.train
    if not task.generates:
        return shlex.join([_executable(), "predict", str(prefix), "--input", source or "FILE"])
    words = [_executable(), "generate", str(prefix)]
    try:
        record = _held_out(task, data, prefix.name)
    # The data may have changed since training; the command then asks for input.
    except (PrefixJaxError, LookupError, TypeError, AttributeError):
        record = None
    if record is not None and source is not None:
        text = json.dumps(record, ensure_ascii=False)
        words += ["--record", text] if len(text) <= _MAX_RECORD else ["--input", source]
    return shlex.join(words)


def _held_out(task: Task, data: DataConfig, dataset: str) -> Mapping[str, Any] | None:
    """Returns the prompt fields of the first held-out record, in a mixture of this dataset."""
    from prefix_jax.data.source import read_records

    source = data.test or data.dev or data.train
    if source is None or task.form is None:
        return None
    records = read_records(source, tfds_dir=data.tfds_dir)
    own = (r for r in records if data.dataset is None or str(r.fields.get(data.dataset)) == dataset)
    return task.prompt_fields(next(own, records[0]))


def _executable() -> str:
    """Returns a name for this program that works in the user's shell."""
    program = Path(sys.argv[0])
    if program.stem != "prefix-jax" or shutil.which(program.name) == str(program.absolute()):
        return "prefix-jax"
    return str(program)
