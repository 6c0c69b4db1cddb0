"""A complete training run, from a config to a stored prefix."""

from __future__ import annotations

import jax
import rich.console

from prefix_jax import config as configs
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.config import Config
from prefix_jax.runs.build import Records, build_run
from prefix_jax.runs.console import Console
from prefix_jax.runs.finish import RunResult, finish
from prefix_jax.runs.memory import explain_out_of_memory
from prefix_jax.runs.plot import plot_run
from prefix_jax.runs.results import Results, config_digest, save_results
from prefix_jax.runs.resume import refuse_another_run
from prefix_jax.runs.run_directory import RunDirectory
from prefix_jax.runs.session import open_session, train_session


@explain_out_of_memory()
def run(
    config: Config,
    *,
    pretrained: Pretrained | None = None,
    records: Records | None = None,
    console: rich.console.Console | None = None,
    quiet: bool = False,
) -> RunResult:
    """Trains what a config describes, or resumes it where it was interrupted.

    The run directory receives `config.yaml`, `checkpoints/`, `metrics.jsonl`, `tensorboard/` and
    `loss.png`, and at the end `prefix/`, `predictions.jsonl` and `results.json`. A multitask run
    stores one prefix per dataset in `prefixes/DATASET/`, and the shared factors in
    `multitask.safetensors`.

    With several processes, every process calls this. The first one writes and prints.

    Args:
        config: the run.
        pretrained: a loaded backbone; None loads `config.model`.
        records: records by split ("train", "dev", "test"), instead of the config's files.
        console: where progress is shown; None for the terminal.
        quiet: print nothing, not even warnings.

    Raises:
        PrefixJaxError: the config, the data and the backbone do not fit together, another run
            writes to the output, a disk is full, or the loss is not finite. Checkpoints that were
            saved before remain.
    """
    first = jax.process_index() == 0
    display = Console(console, quiet=quiet, primary=first)
    output = RunDirectory(config.output_dir)
    with output.locked():
        output.fetch()
        refuse_another_run(output, config)
        with display.status("loading the model and the data"):
            built = build_run(config, pretrained=pretrained, records=records)
        output.write_config(configs.dump(config))
        with open_session(built, output, display, config.train) as session:
            interrupted = train_session(session, config.train, config.evaluate.metrics[0])
            if first:
                plot_run(output.directory, display.warning, reduction=config.data.reduction)
            if interrupted is not None:
                return RunResult.stopped(session, interrupted)
            result = finish(
                session,
                compare_baseline=config.evaluate.compare_baseline,
                speculative_ngrams=config.train.speculative_ngrams,
            )
            if first:
                results = Results(result.step, result.evaluations)
                save_results(output.directory, config_digest(config), results)
            return result
