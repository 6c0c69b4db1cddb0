"""Tunes a prefix in one call."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from prefix_jax import config
from prefix_jax.api.tuned import Source, Tuned
from prefix_jax.backbones.load import Pretrained
from prefix_jax.config import TaskConfig
from prefix_jax.errors import ConfigError
from prefix_jax.methods import section_of
from prefix_jax.methods.base import Method
from prefix_jax.train.fit import fit as fit_config


def fit(
    pretrained: Pretrained | str | Path,
    method: Method[Any] | None,
    train: Source,
    *,
    dev: Source | None = None,
    test: Source | None = None,
    input: str | None = None,
    target: str | None = None,
    messages: str | None = None,
    pair: str | None = None,
    task: TaskConfig | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 8,
    learning_rate: float = 1e-2,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
    quiet: bool = False,
) -> Tuned:
    """Tunes a prefix.

    Args:
        pretrained: of `load`, or what it takes.
        method: what trains: `PrefixTuning(length=16)`, say; None fine-tunes the whole backbone.
        train, dev, test: files, `tfds:NAME/SPLIT`, or iterables of records.
        input: template of the text that is given: "{facts} =>".
        target: template of the text to learn: " {text}".
        messages: the field that holds a chat, in place of both templates.
        pair: template of a second text, for a task with labels.
        task: what is made of a text: `Task("classify", label="label")`, say, trains a head beside
            the prefix; None generates the target.
        steps, epochs: how long; one of them.
        batch_size: examples per step.
        learning_rate: the peak.
        output: the run directory; None takes a temporary one. A run that was interrupted continues.
        overrides: anything else of the config, as on the command line: "optim.schedule=cosine".
        console: where progress is shown.
        quiet: show nothing.

    Raises:
        PrefixJaxError: see `prefix_jax.train.fit.fit`.
    """
    if method is not None and not isinstance(method, Method):
        raise ConfigError(
            f"method is {method!r}; give one such as PrefixTuning(length=16), or None, which "
            "trains the whole backbone"
        )
    if not isinstance(pretrained, Pretrained | str | Path):
        raise ConfigError(
            f"the model is a {type(pretrained).__name__}; give what prefix_jax.load returned, or "
            "what it takes"
        )
    if task is not None and not isinstance(task, TaskConfig):
        raise ConfigError(f"task is {task!r}; give one such as Task('classify', label='label')")
    if isinstance(overrides, str):
        raise ConfigError(f"overrides is {overrides!r}; give a list, such as [{overrides!r}]")
    loaded = pretrained if isinstance(pretrained, Pretrained) else None
    splits = {"train": train, "dev": dev, "test": test}
    named = {name: str(s) for name, s in splits.items() if isinstance(s, str | Path)}
    records = {
        name: s for name, s in splits.items() if s is not None and not isinstance(s, str | Path)
    }
    values = {
        "model": {"path": str(pretrained)}
        if loaded is None
        else {"path": loaded.source, "quantize": loaded.quantize},
        "method": section_of(method),
        "data": {
            "input": input,
            "target": target,
            "messages": messages,
            "pair": pair,
            "batch_size": batch_size,
            **named,
        },
        "optim": {"learning_rate": learning_rate},
        "train": {"steps": steps, "epochs": epochs},
        "task": dataclasses.asdict(task or TaskConfig()),
        "output": str(output or tempfile.mkdtemp(prefix="prefix_jax-")),
    }
    run_config = config.parse(values, overrides)
    run = fit_config(run_config, pretrained=loaded, records=records, console=console, quiet=quiet)
    return Tuned(run.pretrained, run.produced, run.card, run, run.head)
