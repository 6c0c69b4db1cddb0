"""Warnings about settings that are valid, but probably a mistake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prefix_jax.config import DataConfig, OptimConfig
from prefix_jax.data.source import Record
from prefix_jax.tasks import Task
from prefix_jax.tasks.template import Template


def config_warnings(
    data: DataConfig,
    optim: OptimConfig,
    task: Task,
    sources: Mapping[str, Sequence[Record]],
    steps: int,
) -> tuple[str, ...]:
    """Finds settings that are probably a mistake.

    Args:
        data: the data.
        optim: optimizer and schedule.
        task: what the model is asked to do.
        sources: the records of every split.
        steps: optimizer steps of the whole run.

    Returns:
        One warning per finding, each with a remedy.
    """
    return (*_schedule(optim, steps), *_splits(data, sources), *_templates(task))


def _schedule(optim: OptimConfig, steps: int) -> Iterator[str]:
    if optim.warmup_steps > steps:
        reached = optim.learning_rate * steps / optim.warmup_steps
        yield (
            f"optim.warmup_steps is {optim.warmup_steps}, but the run has {steps} steps: the "
            f"learning rate only reaches {reached:.2g} of {optim.learning_rate:g}; lower "
            "optim.warmup_steps"
        )
    if optim.decay_every is not None and optim.decay_every >= steps:
        yield (
            f"optim.decay_every is {optim.decay_every}, but the run has {steps} steps: the "
            "learning rate never decays; lower optim.decay_every"
        )


def _splits(data: DataConfig, sources: Mapping[str, Sequence[Record]]) -> Iterator[str]:
    harms = {
        "dev": "the best step is selected on training data",
        "test": "the result does not generalize to new data",
    }
    for name, other in (("dev", "train"), ("test", "train"), ("test", "dev")):
        if name in sources and other in sources and _equal(sources[name], sources[other]):
            harm = harms[name] if other == "train" else "the best step is selected on the test data"
            yield (
                f"data.{name} has the same records as data.{other}: {harm}; use held-out records "
                f"as data.{name}"
            )
    count = len(sources["train"])
    if data.batch_size > count:
        yield (
            f"data.batch_size is {data.batch_size}, but there are only {count} training records: "
            "every step repeats some of them; lower data.batch_size"
        )


def _templates(task: Task) -> Iterator[str]:
    templates = dict(task.templates)
    target = templates.pop("target", None)
    if templates and not any(Template(text).fields for text in templates.values()):
        names = " and ".join(f"data.{name}" for name in templates)
        text = next(iter(templates.values()))
        yield (
            f"{names} without a {{field}}: every example has the same input, {text[:60]!r}; "
            "put field names in braces, such as {text}"
        )
    if target is not None and not Template(target).fields:
        yield (
            f"data.target without a {{field}}: every example has the same target, "
            f"{target[:60]!r}; put field names in braces, such as {{text}}"
        )


def _equal(ours: Sequence[Record], theirs: Sequence[Record]) -> bool:
    """Returns whether two splits have equal records."""
    return len(ours) == len(theirs) and all(
        # As text: fields from Python may be arrays, whose == has no truth value.
        a.fields is b.fields or str(a.fields) == str(b.fields)
        for a, b in zip(ours, theirs, strict=True)
    )
