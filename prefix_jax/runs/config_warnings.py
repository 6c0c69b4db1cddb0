"""Warnings about settings that are valid, and probably a mistake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prefix_jax.config import Config
from prefix_jax.data.source import Record
from prefix_jax.data.template import Template


def careless(
    config: Config, sources: Mapping[str, Sequence[Record]], steps: int
) -> tuple[str, ...]:
    """Finds settings that are probably a mistake.

    Args:
        config: the run.
        sources: the records of every split.
        steps: of the whole run.

    Returns:
        One warning per finding: what is odd, and what to do.
    """
    return (*_schedule(config, steps), *_splits(config, sources), *_templates(config))


def _schedule(config: Config, steps: int) -> Iterator[str]:
    optim = config.optim
    if optim.warmup_steps > steps:
        reached = optim.learning_rate * steps / optim.warmup_steps
        yield (
            f"optim.warmup_steps is {optim.warmup_steps}, and the run has {steps} steps: the "
            f"learning rate only reaches {reached:.2g} of {optim.learning_rate:g}; lower "
            "optim.warmup_steps"
        )
    if optim.decay_every is not None and optim.decay_every >= steps:
        yield (
            f"optim.decay_every is {optim.decay_every}, and the run has {steps} steps: the "
            "learning rate never decays; lower optim.decay_every"
        )


def _splits(config: Config, sources: Mapping[str, Sequence[Record]]) -> Iterator[str]:
    uses = {
        "dev": "the best step is chosen on data that it was trained on",
        "test": "the result says nothing about other data",
    }
    for name, other in (("dev", "train"), ("test", "train"), ("test", "dev")):
        if name in sources and other in sources and _equal(sources[name], sources[other]):
            harm = uses[name] if other == "train" else "the best step is chosen on the test data"
            yield (
                f"data.{name} holds the same records as data.{other}: {harm}; hold records out "
                f"for data.{name}"
            )
    count = len(sources["train"])
    if config.data.batch_size > count:
        yield (
            f"data.batch_size is {config.data.batch_size}, and there are {count} training "
            "records: every step repeats some of them; lower data.batch_size"
        )


def _templates(config: Config) -> Iterator[str]:
    data = config.data
    given = [text for text in (data.input, data.pair) if text is not None]
    if given and not any(Template(text).fields for text in given):
        names = "data.input" if data.pair is None else "data.input and data.pair"
        yield (
            f"{names} without a {{field}}: every example reads the same text, {given[0][:60]!r}; "
            "name the fields in braces, such as {text}"
        )
    if data.target is not None and not Template(data.target).fields:
        yield (
            f"data.target without a {{field}}: every example learns the same text, "
            f"{data.target[:60]!r}; name the fields in braces, such as {{text}}"
        )


def _equal(ours: Sequence[Record], theirs: Sequence[Record]) -> bool:
    """Whether two splits have equal records; ends at the first difference."""
    return len(ours) == len(theirs) and all(
        # By text: fields from Python may hold arrays, whose == has no truth value.
        a.fields is b.fields or str(a.fields) == str(b.fields)
        for a, b in zip(ours, theirs, strict=True)
    )
