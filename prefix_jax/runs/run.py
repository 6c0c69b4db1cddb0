"""A whole training run, from a config to a stored prefix."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from prefix_jax import artifact
from prefix_jax import config as configs
from prefix_jax.artifact import PREFIXES, Card
from prefix_jax.backbones.fingerprint import fingerprint
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.config import Config
from prefix_jax.errors import DamagedCheckpointError
from prefix_jax.evaluate.report import metrics_of
from prefix_jax.evaluate.run import Evaluation, Evaluator
from prefix_jax.methods import name_of
from prefix_jax.nn.quantized import QTensor
from prefix_jax.prefix import Embeds, Produced
from prefix_jax.runs.build import Records, Setup, build_run
from prefix_jax.runs.checkpoints import Checkpoints
from prefix_jax.runs.console import Report
from prefix_jax.runs.loop import stop_signal, train
from prefix_jax.runs.memory import out_of_memory
from prefix_jax.runs.multitask import save_parts
from prefix_jax.runs.process_sync import host_names
from prefix_jax.runs.profiler import Profiler
from prefix_jax.runs.results import Results, save_results, write_whole
from prefix_jax.runs.resume import identity_of, refuse_another_run, restore
from prefix_jax.runs.run_directory import CONFIG, RunDirectory
from prefix_jax.runs.watchdog import Watchdog
from prefix_jax.terminal import print_warning
from prefix_jax.train.init import start_of
from prefix_jax.train.step import TrainState

_SHOWN = 20  # labels that are named


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run leaves.

    Attributes:
        directory: where everything lies.
        pretrained: the backbone; the fine-tuned one after `method: full`.
        produced: the trained prefix as its method produces it; None after `method: full`.
        card: what is known about it; None after `method: full`.
        step: the step that `produced` comes from: the best one on the dev split, or the last.
        evaluations: of the test split, by name: "after", and "before" where it was asked for.
        head: the weights of a task's head; None where text is generated.
        tasks: of a run that trained several tasks, the prefix of each and its card, by name.
            `produced` then is all of them, a bank, and has no card.
        interrupted: the signal that ended the run early, if one did; the same command continues it.
    """

    directory: Path
    pretrained: Pretrained
    produced: Produced | None = dataclasses.field(repr=False)
    card: Card | None
    step: int
    evaluations: Mapping[str, Evaluation] = dataclasses.field(repr=False)
    head: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)
    tasks: Mapping[str, tuple[Produced, Card]] = dataclasses.field(default_factory=dict, repr=False)
    interrupted: signal.Signals | None = None


@out_of_memory()
def fit(
    config: Config,
    *,
    pretrained: Pretrained | None = None,
    records: Records | None = None,
    console: Console | None = None,
    quiet: bool = False,
) -> Run:
    """Trains what `config` describes, or continues where it was interrupted.

    The run directory gets `config.yaml`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`,
    `loss.png`, and at the end `prefix/`, `predictions.jsonl` and `results.json`. A
    multitask run stores one prefix per task in `prefixes/TASK/` and the shared factors in
    `multitask.safetensors`. With several processes, every process calls this; the first one writes
    and prints. See `RunDirectory` for a run in a bucket.

    Args:
        config: the run.
        pretrained: a backbone that is loaded already; None loads `config.model`.
        records: examples from Python, by split ("train", "dev", "test").
        console: where progress is shown; None is the terminal.
        quiet: show nothing.

    Raises:
        PrefixJaxError: something in the config, the data or the backbone does not fit, another
            run writes to the output, a disk is full, or the loss is not finite. What was saved
            before stays.
    """
    place = RunDirectory(config.output_dir)
    with place.owned():
        return _fit(config, place, pretrained, records, console or Console(), quiet)


def _fit(
    config: Config,
    place: RunDirectory,
    pretrained: Pretrained | None,
    records: Records | None,
    console: Console,
    quiet: bool,
) -> Run:
    """The run of `fit`, in a directory that nothing else writes to."""
    first = jax.process_index() == 0
    place.fetch()
    directory = place.directory
    if first:
        refuse_another_run(place, config)
    hidden = quiet or not first
    with contextlib.nullcontext() if hidden else console.status("loading the model and the data"):
        setup = build_run(config, pretrained=pretrained, records=records)
    if first:
        write_whole(directory / CONFIG, configs.dump(config))
    evaluator = Evaluator(
        setup.model,
        setup.pretrained.tokenizer,
        setup.mesh,
        config.evaluate,
        config.decode,
        setup.task,
        setup.pretrained.ends(chat=config.data.messages is not None),
    )
    evaluator.check(setup.splits.get("dev", ()), config.evaluate.metrics[:1])
    evaluator.check(setup.splits.get("test", ()), config.evaluate.metrics)
    warnings: list[str] = []
    with contextlib.ExitStack() as stack:
        # Last, and however the run ends.
        stack.callback(place.publish)
        checkpoints = stack.enter_context(
            Checkpoints(place.checkpoints, config.train.keep_checkpoints, warnings.append)
        )
        identity = identity_of(setup)
        state, progress = restore(setup, checkpoints, identity)
        report = stack.enter_context(
            Report(
                directory,
                total_steps=setup.steps,
                start_step=int(state.step),
                log_every=config.train.log_every,
                console=console,
                quiet=quiet,
                primary=first,
            )
        )
        for warning in warnings:
            report.warning(warning)
        _announce(setup, state, report)
        # Where a process stands still, it alone can say so.
        warn = report.warning if first else print_warning
        watch = Watchdog(warn, host_names(), jax.process_index())
        profile = Profiler(directory / "profile", int(state.step), config.train.profile_steps)
        with stop_signal() as stop, watch, profile:
            state = train(
                setup,
                state,
                progress,
                checkpoints=checkpoints,
                publish=place.publish,
                report=report,
                evaluator=evaluator,
                metadata=identity,
                stop=stop,
                watch=watch,
                profile=profile,
            )
        report.plot(reduction=config.data.reduction)
        step = int(state.step)
        if step < setup.steps and not progress.stopped:
            report.message(f"interrupted after step {step}, which is saved: run the same again")
            # Of several processes, one may have ended at another's signal.
            cause = stop.cause or signal.SIGTERM
            return Run(directory, setup.pretrained, None, None, step, {}, interrupted=cause)
        if progress.best_step not in (None, step):
            try:
                state = checkpoints.restore(progress.best_step, state)[0]
                step = progress.best_step
            except DamagedCheckpointError as error:
                report.warning(
                    f"storing the prefix of step {step}, the last one, instead of the best on dev "
                    f"(step {progress.best_step}): {error}"
                )
        return _finish(setup, state, step, evaluator, report, directory)


def _announce(setup: Setup, state: TrainState, report: Report) -> None:
    """Says what is about to happen, and what happened to the data."""
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.train))
    frozen = sum(
        leaf.size
        for leaf in jax.tree.leaves(setup.frozen, is_leaf=lambda x: isinstance(x, QTensor))
    )
    for warning in setup.warnings:
        report.warning(warning)
    held = setup.pretrained.quantize
    train_examples = setup.splits["train"]
    report.message(
        f"{setup.pretrained.source}: {frozen:,} parameters frozen"
        f"{'' if held == 'none' else f' in {held}'}, {trained:,} trained "
        f"({name_of(setup.model.method)}{' and head' * (setup.model.head is not None)}); "
        f"{len(train_examples):,} training examples, "
        f"{setup.steps} steps of {setup.config.data.batch_size}"
    )
    labels = setup.task.labels or ()
    if labels:
        more = f", … ({len(labels)} in all)" if len(labels) > _SHOWN else ""
        report.message(f"labels: {', '.join(map(repr, labels[:_SHOWN]))}{more}")
    for name, examples in setup.splits.items():
        for what, sources in (("cut to fit", examples.truncated), ("dropped", examples.dropped)):
            if sources:
                report.warning(
                    f"{name}: {len(sources)} of {len(examples) + len(examples.dropped)} examples "
                    f"were {what} (first: {sources[0]}); see data.max_length"
                )
    if setup.config.data.pack and not setup.model.packs:
        report.message(
            "each example has a row of its own, in spite of data.pack: what soft tokens before an "
            "encoder become depends on the text behind them"
        )
    if int(state.step):
        report.message(f"continuing after step {int(state.step)}")


def _finish(
    setup: Setup,
    state: TrainState,
    step: int,
    evaluator: Evaluator,
    report: Report,
    directory: Path,
) -> Run:
    """Stores what was trained, and measures it on the test split."""
    params, pretrained = setup.params(state), setup.pretrained
    with jax.set_mesh(setup.mesh):
        produced = jax.jit(setup.model.produced)(params)
        prefix = jax.jit(setup.model.prefix)(params)
    head, tasks = params.get("head"), setup.model.method.task_names if setup.model.method else ()
    # By task, or the only one under an empty name.
    stored: dict[str, tuple[Produced, Card]] = {}
    if produced is None:
        pretrained = copy.copy(pretrained)
        pretrained.params = params["backbone"]
        pretrained.fingerprint = fingerprint(pretrained.params)
    else:
        parts = produced.split_tasks() if isinstance(produced, Embeds) else (produced,)
        for name, part in zip(tasks or ("",), parts, strict=True):
            stored[name] = part, _card(setup, part, step, head, name)
        _save(directory, stored, head)
    if tasks and jax.process_index() == 0:
        save_parts(directory, params["prefix"])

    evaluations: dict[str, Evaluation] = {}
    if "test" in setup.splits:
        both = ", before and after" if setup.config.evaluate.compare_baseline else ""
        report.message(f"measuring on {len(setup.splits['test']):,} test examples{both}")
        bare = {"before": None} if setup.config.evaluate.compare_baseline else {}
        tuned = {"after": prefix}
        weights = [(pretrained, bare | tuned)]
        if produced is None:
            weights = [(setup.pretrained, bare), (pretrained, tuned)]
        for backbone, prefixes in weights:
            evaluations |= evaluator.compare(
                backbone, prefixes, setup.splits["test"], report.phase, head
            )
        report.evaluation(step, evaluations["after"].report.metrics, kind="test")
    if stored and evaluations:
        found = evaluations["after"].report.metrics
        for name, (part, card) in stored.items():
            own = found if not name else metrics_of(name, found)
            metrics = {f"test_{metric}": value for metric, value in own.items()}
            stored[name] = part, dataclasses.replace(card, metrics={**card.metrics, **metrics})
        _save(directory, stored, head)
    if jax.process_index() == 0:
        save_results(directory, setup.config, Results(step, evaluations))
    if tasks:
        return Run(directory, pretrained, produced, None, step, evaluations, head, stored)
    only = stored[""][1] if stored else None
    return Run(directory, pretrained, produced, only, step, evaluations, head)


def _save(
    directory: Path,
    stored: Mapping[str, tuple[Produced, Card]],
    head: Mapping[str, Any] | None,
) -> None:
    """Stores the prefix of a run, or that of each of its tasks."""
    for name, (produced, card) in stored.items():
        place = directory / PREFIXES / name if name else directory / "prefix"
        artifact.save(place, produced, card, head=head)


def _init(setup: Setup) -> str:
    """What the prefix was before training, in words."""
    assert setup.model.method is not None
    config = setup.config.init
    start = start_of(setup.model.method, config)
    which = config.text or config.text_file or ", ".join(config.labels or ()) or config.path
    return start if which is None or which == "" else f"{start}: {which}"


def _card(
    setup: Setup, produced: Produced, step: int, head: Mapping[str, Any] | None, task: str
) -> Card:
    """The card of a prefix; of one of several tasks, with its name."""
    config, pretrained = setup.config, setup.pretrained
    assert setup.model.method is not None
    method = dict(config.method)
    if task:
        method |= {"tasks": list(setup.model.method.task_names), "task": task}
    vocabulary = pretrained.tokenizer.get_vocab()
    data = config.data
    return artifact.make_card(
        produced,
        pretrained.backbone.geometry,
        artifact.BackboneCard(
            source=pretrained.source,
            model_type=pretrained.backbone.arch.model_type,
            fingerprint=pretrained.fingerprint,
            dtype=str(pretrained.params["embed"]["tokens_VD"].dtype),
            quantize=pretrained.quantize,
        ),
        method=method,
        init=_init(setup),
        steps=step,
        template=artifact.TemplateCard(
            **{f.name: getattr(data, f.name) for f in dataclasses.fields(artifact.TemplateCard)}
        ),
        decode=dataclasses.asdict(config.decode),
        task=None
        if setup.model.head is None or head is None
        else artifact.TaskCard(
            config=dataclasses.asdict(setup.task),
            head=dataclasses.asdict(setup.model.head),
            shapes={name: x.shape for name, x in head.items()},
        ),
        tokenizer=artifact.TokenizerCard.of(type(pretrained.tokenizer).__name__, vocabulary),
    )
