"""The console of a run: a progress bar on a terminal, plain lines in a log."""

from __future__ import annotations

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping

import rich.console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from prefix_jax.runs.final_report import duration, number
from prefix_jax.runs.metric_writer import Kind
from prefix_jax.terminal import escape
from prefix_jax.terminal.console import encodable, guard, make_console
from prefix_jax.train.loop import Hook


class Console(Hook):
    """Shows the progress of a run.

    On a terminal it shows one bar: step, smoothed loss, tokens per second (without padding),
    elapsed time and time left. Anywhere else (a log, CI, nohup) it prints a plain line every
    `log_every` steps.

    A display that fails never stops a run, which continues without it.

    Args:
        console: where to print; standard output by default.
        quiet: show nothing, not even warnings.
        primary: False on all processes but the first, which then show nothing.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        console: rich.console.Console | None = None,
        *,
        quiet: bool = False,
        primary: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = make_console() if console is None else guard(console)
        self._visible = primary and not quiet
        self._clock = clock
        self._total, self._log_every = 0, 10
        self._throughput = Throughput(0, clock)
        self._bar: Progress | None = None

    @contextlib.contextmanager
    def training(
        self, total_steps: int, start_step: int = 0, log_every: int = 10
    ) -> Iterator[None]:
        """Shows the bar inside the block.

        Args:
            total_steps: optimizer steps of the whole run.
            start_step: how many of them were taken before this process.
            log_every: steps between printed lines if there is no terminal.
        """
        self._total, self._log_every = total_steps, log_every
        self._throughput = Throughput(total_steps, self._clock)
        if not (self._visible and self._console.is_interactive):
            yield
            return
        bar = Progress(
            _TextColumn(lambda task: task.description),
            BarColumn(bar_width=None),
            _TextColumn(lambda task: f"{task.completed:.0f}/{task.total:.0f}"),
            _TextColumn(lambda task: task.fields["numbers"]),
            _TextColumn(lambda task: duration(task.elapsed or 0)),
            _TextColumn(lambda task: task.fields["left"]),
            console=self._console,
            expand=True,
            refresh_per_second=4,
        )
        task = bar.add_task(
            "compiling", total=total_steps, completed=start_step, numbers="", left=""
        )
        self._show(bar.start)
        self._bar = bar
        description = "stopped"
        try:
            yield
            description = "done" if bar.finished else "stopped"
        finally:
            self._bar = None
            bar.update(task, description=description, left="")
            self._show(bar.stop)

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Shows a spinner with a text inside the block."""
        if not self._visible:
            yield
            return
        status = self._console.status(text)
        self._show(status.start)
        try:
            yield
        finally:
            self._show(status.stop)

    def on_metrics(self, step: int, metrics: Mapping[str, float], seconds: float) -> bool:
        """Shows one optimizer step.

        Args:
            step: its number.
            metrics: at least loss, tokens (without padding) and learning_rate.
            seconds: the duration of the step.
        """
        first = self._throughput.steps == 0
        self._throughput.add(step, metrics["loss"], metrics["tokens"], seconds)
        left = f"{duration(self._throughput.left)} left" if self._throughput.left else ""
        loss = f"loss {self._throughput.loss:.3f}"
        speed = self._throughput.tokens_per_second
        tokens = "" if speed is None else f"{speed:,.0f} tokens/s"
        if self._bar is not None:
            bar, (task,) = self._bar, self._bar.task_ids
            numbers = f"{loss}  {tokens}"
            self._show(
                lambda: bar.update(
                    task, completed=step, description="training", numbers=numbers, left=left
                )
            )
        elif first or step % self._log_every == 0 or step == self._total:
            rate = f"lr {metrics['learning_rate']:.2e}"
            elapsed = f"{duration(self._throughput.elapsed)} elapsed"
            times = f"compiled in {seconds:.1f} s" if first else elapsed
            parts = (self._at(step), loss, rate, tokens, times, left)
            self.message("  ".join(part for part in parts if part))
        return False

    def write(self, step: int, kind: Kind, values: Mapping[str, float]) -> None:
        """Prints the results of an evaluation, by metric."""
        results = "  ".join(f"{name} {number(name, value)}" for name, value in values.items())
        self.message(f"{self._at(step)}  {kind}: {results}")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows a name ("evaluating") next to the bar inside the block."""
        if self._bar is None:
            yield
            return
        bar, (task,) = self._bar, self._bar.tasks
        before = task.description
        self._show(lambda: bar.update(task.id, description=name))
        try:
            yield
        finally:
            self._show(lambda: bar.update(task.id, description=before))

    def message(self, text: str) -> None:
        """Prints a line, above the bar if it is shown."""
        if self._visible:
            self._print(Text(self._printable(text)))

    def warning(self, text: str) -> None:
        """Prints a highlighted line."""
        if self._visible:
            self._print(Text.assemble(("warning: ", "bold yellow"), self._printable(text)))

    def _at(self, step: int) -> str:
        return f"step {step:{len(str(self._total))}d}/{self._total}"

    def _printable(self, text: str) -> str:
        """Escapes text for the console, in its encoding: rich fails on anything else."""
        return encodable(escape(text), self._console.encoding)

    def _print(self, text: Text) -> None:
        # Never wrap a line of a log, whatever width rich assumes.
        soft_wrap = not self._console.is_terminal
        self._show(lambda: self._console.print(text, soft_wrap=soft_wrap))

    def _show(self, draw: Callable[[], object]) -> None:
        try:
            draw()
        except (Exception, SystemExit):  # rich exits if its pipe is closed
            self._console.quiet = True


class Throughput:
    """The speed of a run, and the time that it still needs.

    The first step compiles and counts for neither. The time left is estimated from elapsed time,
    so that it includes evaluations and checkpoints.

    Attributes:
        steps: the number of recorded steps.
        loss: exponential mean over about ten steps, ignoring values that are not finite.
        tokens_per_second: over the last twenty steps; None after the first step.
        left: seconds; None after the first step.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self._total, self._clock = total_steps, clock
        self._began = clock()
        self._compiled = 0.0
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=20)
        self._mean = self._weight = 0.0
        self.steps = 0
        self.left: float | None = None

    def add(self, step: int, loss: float, tokens: float, seconds: float) -> None:
        """Records one step, see `Console.on_metrics`."""
        now = self._clock()
        self.steps += 1
        if math.isfinite(loss):
            self._mean, self._weight = 0.9 * self._mean + 0.1 * loss, 0.9 * self._weight + 0.1
        if self.steps == 1:
            self._compiled = now
            return
        self._recent.append((tokens, seconds))
        self.left = (now - self._compiled) / (self.steps - 1) * (self._total - step)

    @property
    def loss(self) -> float:
        return self._mean / self._weight if self._weight else math.nan

    @property
    def tokens_per_second(self) -> float | None:
        seconds = sum(seconds for _, seconds in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds > 0 else None

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began


class _TextColumn(ProgressColumn):
    """A column of plain text."""

    def __init__(self, text: Callable[[Task], str]) -> None:
        # On a narrow terminal the bar shrinks, the numbers do not.
        super().__init__(Column(no_wrap=True))
        self._text = text

    def render(self, task: Task) -> Text:
        return Text(escape(self._text(task)), no_wrap=True)
