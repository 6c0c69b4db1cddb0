"""Final report of a run: scores and samples before and after, outputs, and the next command."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from prefix_jax.evaluate.report import PERCENTAGES
from prefix_jax.terminal import escape
from prefix_jax.terminal.console import text as escaped

_TITLES = {
    "loss": "token loss (nats)",
    "perplexity": "perplexity",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "exact_match": "exact match (%)",
    "accuracy": "accuracy (%)",
    "f1": "F1 (%)",
    "f1_macro": "macro F1 (%)",
    "matthews": "Matthews (%)",
    "pearson": "Pearson (%)",
    "spearman": "Spearman (%)",
}
_LOWER_IS_BETTER = {"loss", "perplexity"}


@dataclasses.dataclass(frozen=True)
class Sample:
    """The predictions for one held-out input.

    Attributes:
        input: the input.
        reference: the expected output.
        before: the output without the prefix; None if it was not requested.
        after: the output with the prefix.
        made: "generated", or "answered" by a head.
    """

    input: str
    reference: str
    before: str | None
    after: str
    made: str = "generated"


def number(metric: str, value: float) -> str:
    """Formats the value of a metric with its significant digits."""
    kind = _kind(metric)
    return f"{value:.2f}" if kind in PERCENTAGES or kind == "perplexity" else f"{value:.4f}"


def _kind(metric: str) -> str:
    """Returns the name of a metric without its task ("TASK.METRIC")."""
    return metric.rpartition(".")[2]


def duration(seconds: float) -> str:
    """Formats seconds as 0:07, 12:34 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def comparison(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """Makes a table of metrics: before, after and change, or only the values without `before`."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for column in ("before", "after", "change") if before else ("held-out",):
        table.add_column(column, justify="right")
    for name in after:
        task, _, kind = name.rpartition(".")
        title = escaped(f"{task}: " * bool(task) + _TITLES.get(kind, kind))
        value = Text(number(name, after[name]), style="bold")
        if not before:
            table.add_row(title, value)
        elif name in before:
            change = after[name] - before[name]
            better = change < 0 if _kind(name) in _LOWER_IS_BETTER else change > 0
            style = "" if change == 0 or math.isnan(change) else "green" if better else "red"
            signed = ("+" if change > 0 else "") + number(name, change)
            table.add_row(title, number(name, before[name]), value, Text(signed, style=style))
    return table


def generations(samples: Sequence[Sample]) -> RenderableType:
    """Shows one panel per sample: input and reference, then before and after side by side."""
    return Group(*(_generation(sample) for sample in samples))


def _generation(sample: Sample) -> Panel:
    given = Table.grid(padding=(0, 2))
    given.add_column(style="dim")
    given.add_column(ratio=1)
    given.add_row("input", _plain(sample.input))
    given.add_row("reference", _plain(sample.reference))
    if sample.before is None:
        given.add_row(sample.made, _plain(sample.after), style="bold")
        return Panel(given)

    sides = Table(box=box.SIMPLE_HEAD, expand=True, show_edge=False, pad_edge=False)
    sides.add_column("before", ratio=1)
    sides.add_column("after", ratio=1, style="bold")
    sides.add_row(_plain(sample.before), _plain(sample.after))
    return Panel(Group(given, "", sides))


def print_final_report(
    console: Console,
    *,
    before: Mapping[str, float],
    after: Mapping[str, float],
    samples: Sequence[Sample],
    written: Mapping[str, object],
    command: str | None,
) -> None:
    """Prints the final report of a run.

    Args:
        console: where to print.
        before: held-out metrics without the prefix; empty if not measured.
        after: held-out metrics with the prefix; empty without held-out data.
        samples: a few held-out examples.
        written: the path of each output, by name: {"prefix": path, …}.
        command: a command that uses the prefix; None if there is none.
    """
    if samples:
        console.print(generations(samples))
    if after:
        console.print("", comparison(before, after), sep="\n")
    console.print()
    width = max(map(len, written), default=0)
    # Without box and wrapping, so that paths and the command can be copied.
    for what, path in written.items():
        console.print(escaped(f"{what:<{width}}  {path}"), soft_wrap=True)
    if command is not None:
        console.print(Text.assemble("\nUse it:\n  ", (escape(command), "bold")), soft_wrap=True)


def _plain(text: str) -> Text:
    shown = text.strip()
    return escaped(shown) if shown else escaped("(nothing)", "dim italic")
