"""Stores what a run has trained, and measures it on the test split."""

from __future__ import annotations

import copy
import dataclasses
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from prefix_jax import artifact
from prefix_jax.artifact import PREFIXES, Card
from prefix_jax.backbones.fingerprint import fingerprint
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.data.ngrams import NgramTable
from prefix_jax.errors import DamagedCheckpointError
from prefix_jax.evaluate.evaluator import Evaluation
from prefix_jax.evaluate.report import metrics_of
from prefix_jax.prefix import Embeds, Prefix, Produced
from prefix_jax.runs.build import Run
from prefix_jax.runs.mixture import save_factors
from prefix_jax.runs.session import Session
from prefix_jax.tasks import ChatTask, TextTask
from prefix_jax.train.step import TrainState

# Prefixes and their cards by dataset; without a mixture, one under an empty name.
_Trained = dict[str, tuple[Produced, Card]]


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        directory: the run directory.
        pretrained: the backbone; after full fine-tuning, the trained one.
        produced: the trained prefix as its method produces it; for a mixture, all of them as
            a bank. None after full fine-tuning.
        card: its card; None after full fine-tuning and for a mixture.
        step: the step that `produced` comes from: the best one on the dev split, or the last.
        evaluations: on the test split: "after" training, and "before" if requested.
        head: the weights of a task's head; None if the task generates text.
        datasets: for a mixture, the prefix and the card of each dataset, by name.
        ngrams: n-gram tables of the training targets, for speculative decoding: by dataset, or
            without a mixture, under an empty name.
        interrupted: the signal that ended the run early, if any; the same config resumes it.
    """

    directory: Path
    pretrained: Pretrained
    produced: Produced | None = dataclasses.field(repr=False)
    card: Card | None
    step: int
    evaluations: Mapping[str, Evaluation] = dataclasses.field(repr=False)
    head: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)
    datasets: Mapping[str, tuple[Produced, Card]] = dataclasses.field(
        default_factory=dict, repr=False
    )
    ngrams: Mapping[str, NgramTable] = dataclasses.field(default_factory=dict, repr=False)
    interrupted: signal.Signals | None = None

    @classmethod
    def stopped(cls, session: Session, interrupted: signal.Signals) -> RunResult:
        """The result of a run that a signal ended early."""
        step, pretrained = int(session.state.step), session.run.pretrained
        return cls(
            session.output.directory, pretrained, None, None, step, {}, interrupted=interrupted
        )


def finish(
    session: Session, *, compare_baseline: bool = False, speculative_ngrams: bool = True
) -> RunResult:
    """Stores the prefix of the best step, and measures it on the test split.

    The prefix is stored before it is measured, and again with its metrics, so that a run that is
    killed meanwhile leaves it.

    Args:
        session: a run that has trained its last step.
        compare_baseline: also measure without the prefix.
        speculative_ngrams: store n-gram tables of the training targets with the prefixes.
    """
    run, directory = session.run, session.output.directory
    state, step = _best_state(session)
    params = run.program.params(state)
    with jax.set_mesh(run.mesh):
        produced = jax.jit(run.model.produced)(params)
        prefix = jax.jit(run.model.prefix)(params)
    head, pretrained = params.get("head"), run.pretrained
    if produced is None:
        pretrained = copy.copy(pretrained)
        pretrained.params = params["backbone"]
        pretrained.fingerprint = fingerprint(pretrained.params)
    trained = _with_cards(run, produced, step)
    ngrams = _count_ngrams(run) if speculative_ngrams and trained else {}
    _save(directory, trained, head, ngrams)
    datasets = run.model.method.dataset_names if run.model.method else ()
    if datasets and jax.process_index() == 0:
        save_factors(directory, params["prefix"])

    evaluations: dict[str, Evaluation] = {}
    if "test" in run.splits:
        evaluations = _measure(session, pretrained, prefix, head, compare_baseline)
        metrics = evaluations["after"].report.metrics
        for writer in session.writers:
            writer.write(step, "test", metrics)
        trained = _with_metrics(trained, metrics)
        _save(directory, trained, head, ngrams)
    return RunResult(
        directory,
        pretrained,
        produced,
        trained[""][1] if "" in trained else None,
        step,
        evaluations,
        head,
        trained if datasets else {},
        ngrams,
    )


def _best_state(session: Session) -> tuple[TrainState, int]:
    """Returns the state of the best step on the dev split, or else of the last step."""
    best, last = session.progress.best_step, int(session.state.step)
    if best is None or best == last:
        return session.state, last
    try:
        state, _ = session.checkpoints.restore(best, session.state)
    except DamagedCheckpointError as error:
        session.console.warning(
            f"storing the prefix of the last step ({last}) instead of the best on dev ({best}): "
            f"{error}"
        )
        return session.state, last
    return state, best


def _with_cards(run: Run, produced: Produced | None, step: int) -> _Trained:
    """Splits the trained value into one prefix per dataset, each with its card."""
    if produced is None:
        return {}
    assert run.model.method is not None
    parts = produced.split_bank() if isinstance(produced, Embeds) else (produced,)
    names = run.model.method.dataset_names or ("",)
    return {
        name: (part, run.make_card(part, step, name))
        for name, part in zip(names, parts, strict=True)
    }


def _count_ngrams(run: Run) -> dict[str, NgramTable]:
    """Makes the n-gram tables of prefixes that generate text."""
    if not isinstance(run.model.task, TextTask | ChatTask):
        return {}
    assert run.model.method is not None
    names, examples = run.model.method.dataset_names, run.splits["train"]
    tables = {
        name: NgramTable.of(
            example for example in examples if not names or example.dataset == index
        )
        for index, name in enumerate(names or ("",))
    }
    return {name: table for name, table in tables.items() if table is not None}


def _with_metrics(trained: _Trained, metrics: Mapping[str, float]) -> _Trained:
    """Adds results on the test split to the cards."""
    updated: _Trained = {}
    for name, (part, card) in trained.items():
        own = metrics_of(name, metrics) if name else metrics
        test = {f"test_{metric}": value for metric, value in own.items()}
        updated[name] = part, dataclasses.replace(card, metrics={**card.metrics, **test})
    return updated


def _measure(
    session: Session,
    pretrained: Pretrained,
    prefix: Prefix | None,
    head: Mapping[str, Any] | None,
    compare_baseline: bool,
) -> dict[str, Evaluation]:
    """Measures the model on the test split "after" training and, if requested, "before"."""
    run, examples = session.run, session.run.splits["test"]
    suffix = ", before and after" if compare_baseline else ""
    session.console.message(f"measuring on {len(examples):,} test examples{suffix}")
    before: dict[str, Prefix | None] = {"before": None} if compare_baseline else {}
    comparisons = [(pretrained, before | {"after": prefix})]
    if pretrained is not run.pretrained:  # fully fine-tuned: another backbone
        comparisons = [(run.pretrained, before), (pretrained, {"after": prefix})]
    evaluations: dict[str, Evaluation] = {}
    for backbone, prefixes in comparisons:
        evaluations |= run.evaluator.compare(
            backbone, prefixes, examples, session.console.phase, head
        )
    return evaluations


def _save(
    directory: Path,
    trained: _Trained,
    head: Mapping[str, Any] | None,
    ngrams: Mapping[str, NgramTable],
) -> None:
    """Stores the prefix of a run, or one per dataset."""
    for name, (produced, card) in trained.items():
        path = directory / PREFIXES / name if name else directory / "prefix"
        artifact.save(path, produced, card, head=head, ngrams=ngrams.get(name))
