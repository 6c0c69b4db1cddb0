"""Everything that a run shows and records: a progress bar or log lines, metrics, the loss curve."""

from __future__ import annotations

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from prefix_jax.errors import PrefixJaxError, reason
from prefix_jax.runs.final_report import duration, number
from prefix_jax.runs.metric_writer import Kind, MetricWriter, read_metrics
from prefix_jax.runs.plot import plot_loss
from prefix_jax.terminal import escape
from prefix_jax.terminal.console import encodable, guard, make_console


class Report:
    """Shows a run while it goes, and records it.

    On a terminal there is one bar: step, smoothed loss, real tokens per second, elapsed time and
    time left. Anywhere else (a log, CI, nohup) there is a plain line every `log_every` steps.
    Every step is recorded in `metrics.jsonl` and for TensorBoard, see `MetricWriter`.

    Nothing that goes wrong with the display stops a run: it goes on in silence, and is recorded.

    Args:
        directory: of the run.
        total_steps: optimizer steps of the whole run.
        start_step: how many of them were taken before this process.
        log_every: steps between the lines that are printed where there is no terminal.
        console: where to print; standard output by default.
        quiet: shows warnings alone.
        primary: False on all processes but the first: nothing is shown or written.
        clock: seconds, for the elapsed time and the time left.

    Raises:
        CheckpointError: by every method that records, when the disk does not take it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        total_steps: int,
        start_step: int = 0,
        log_every: int = 10,
        console: Console | None = None,
        quiet: bool = False,
        primary: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = Path(directory)
        self._total, self._start, self._log_every = total_steps, start_step, log_every
        self._console = make_console() if console is None else guard(console)
        self._visible, self._primary = primary and not quiet, primary
        self._pace = Throughput(total_steps, clock)
        self._record: MetricWriter | None = None
        self._bar: Progress | None = None

    def __enter__(self) -> Report:
        if self._primary:
            self._record = MetricWriter(self.directory, self._start)
        if not self._visible:
            return self
        if self._console.is_interactive:
            bar = Progress(
                _Shown(lambda task: task.description),
                BarColumn(bar_width=None),
                _Shown(lambda task: f"{task.completed:.0f}/{task.total:.0f}"),
                _Shown(lambda task: task.fields["numbers"]),
                _Shown(lambda task: duration(task.elapsed or 0)),
                _Shown(lambda task: task.fields["left"]),
                console=self._console,
                expand=True,
                refresh_per_second=4,
            )
            bar.add_task("compiling", total=self._total, completed=self._start, numbers="", left="")
            self._show(bar.start)
            self._bar = bar
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            (task,) = self._bar.task_ids
            done = error is None and self._bar.finished
            self._bar.update(task, description="done" if done else "stopped", left="")
            self._show(self._bar.stop)
            self._bar = None
        if self._record is not None:
            self._record.close()
            self._record = None

    def step(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Notes one optimizer step.

        Args:
            step: how many were taken, this one included.
            metrics: host floats; at least loss, tokens (real ones) and learning_rate.
            seconds: what the step took.
        """
        if self._record is None:
            return
        first = self._pace.steps == 0
        self._pace.add(step, metrics["loss"], metrics["tokens"], seconds)
        pace = {
            "seconds": round(seconds, 6),
            "tokens_per_second": round(metrics["tokens"] / max(seconds, 1e-9), 1),
        }
        self._record.write(step, "train", {**metrics, **pace})

        left = f"{duration(self._pace.left)} left" if self._pace.left else ""
        loss = f"loss {self._pace.loss:.3f}"
        speed = self._pace.tokens_per_second
        pace_text = "" if speed is None else f"{speed:,.0f} tokens/s"
        if self._bar is not None:
            bar, (task,) = self._bar, self._bar.task_ids
            numbers = f"{loss}  {pace_text}"
            self._show(
                lambda: bar.update(
                    task, completed=step, description="training", numbers=numbers, left=left
                )
            )
        elif first or step % self._log_every == 0 or step == self._total:
            rate = f"lr {metrics['learning_rate']:.2e}"
            elapsed = f"{duration(self._pace.elapsed)} elapsed"
            times = f"compiled in {seconds:.1f} s" if first else elapsed
            parts = (self._at(step), loss, rate, pace_text, times, left)
            self.message("  ".join(part for part in parts if part))

    def evaluation(self, step: int, results: Mapping[str, float], kind: Kind = "dev") -> None:
        """Notes the results of an evaluation, by metric."""
        if self._record is None:
            return
        self._record.write(step, kind, results)
        values = "  ".join(f"{name} {number(name, value)}" for name, value in results.items())
        self.message(f"{self._at(step)}  {kind}: {values}")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Says beside the bar what goes on instead of training: "evaluating", say."""
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
        """Prints a line, above the bar where there is one."""
        if self._visible:
            self._print(Text(self._printable(text)))

    def warning(self, text: str) -> None:
        """Prints a line that stands out, also when quiet."""
        if self._primary:
            self._print(Text.assemble(("warning: ", "bold yellow"), self._printable(text)))

    def plot(
        self, title: str | None = None, reduction: Literal["token", "example"] = "token"
    ) -> Path:
        """Draws the loss of the whole run so far into `loss.png`, and returns where that is.

        Args:
            title: names the run directory by default.
            reduction: of the training loss, see `plot_loss`.
        """
        path = self.directory / "loss.png"
        if self._primary:
            name = escape(title or f"Loss of {self.directory.resolve().name}")
            try:
                plot_loss(read_metrics(self.directory), path, title=name, reduction=reduction)
            except PrefixJaxError:
                raise
            except Exception as error:  # what was trained is worth more than its picture
                self.warning(f"{path} was not drawn: {reason(error)}")
        return path

    def _at(self, step: int) -> str:
        return f"step {step:{len(str(self._total))}d}/{self._total}"

    def _printable(self, text: str) -> str:
        """Escapes text for the console, in its encoding: rich fails on anything else."""
        return encodable(escape(text), self._console.encoding)

    def _print(self, text: Text) -> None:
        # In a log a line stays one line, however narrow rich takes the log to be.
        one_line = not self._console.is_terminal
        self._show(lambda: self._console.print(text, soft_wrap=one_line))

    def _show(self, draw: Callable[[], object]) -> None:
        try:
            draw()
        except (Exception, SystemExit):  # rich exits when nobody reads its pipe any more
            self._console.quiet = True


class Throughput:
    """How fast a run goes, and how long it has to.

    The first step compiles: it counts neither for the speed nor for the time left. The time left
    is judged by the clock, so that evaluations and checkpoints on the way count too.

    Attributes:
        steps: how many were added.
        loss: exponential mean over about ten steps, those left out that are not finite.
        tokens_per_second: over the last twenty steps; None after the first step alone.
        left: seconds; None after the first step alone.
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
        """Takes note of one step, see `Report.step`."""
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


class _Shown(ProgressColumn):
    """A column of plain text."""

    def __init__(self, text: Callable[[Task], str]) -> None:
        # The bar gives way on a narrow terminal, the numbers do not.
        super().__init__(Column(no_wrap=True))
        self._text = text

    def render(self, task: Task) -> Text:
        return Text(escape(self._text(task)), no_wrap=True)
