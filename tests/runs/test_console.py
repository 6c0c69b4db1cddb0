"""A run shows where it stands, on a terminal and in a log, whatever happens to the display."""

import io
import math

import pytest
from rich.console import Console

from prefix_jax.runs.console import Report, Throughput
from prefix_jax.runs.metric_writer import read_metrics


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def metrics(loss=1.0, tokens=100.0):
    return {"loss": loss, "tokens": tokens, "targets": 30.0, "learning_rate": 1e-3}


def log(width=80):
    return Console(file=io.StringIO(), width=width, color_system=None)


def terminal(width=80):
    return Console(file=io.StringIO(), width=width, force_terminal=True, force_interactive=True)


def run(report, clock, steps, compiling=60.0, seconds=1.0):
    """Compiles at the first step, then takes equal steps."""
    for step in steps:
        took = compiling if step == steps[0] else seconds
        clock.now += took
        report.step(step, metrics(), took)


def test_a_log_gets_a_plain_line_now_and_then(tmp_path):
    console, clock = log(), Clock()
    with Report(tmp_path, total_steps=25, console=console, clock=clock) as report:
        run(report, clock, range(1, 26))
        report.evaluation(25, {"loss": 1.25, "bleu": 40.0})
    assert console.file.getvalue().splitlines() == [
        "step  1/25  loss 1.000  lr 1.00e-03  compiled in 60.0 s",
        "step 10/25  loss 1.000  lr 1.00e-03  100 tokens/s  1:09 elapsed  0:15 left",
        "step 20/25  loss 1.000  lr 1.00e-03  100 tokens/s  1:19 elapsed  0:05 left",
        "step 25/25  loss 1.000  lr 1.00e-03  100 tokens/s  1:24 elapsed",
        "step 25/25  dev: loss 1.2500  bleu 40.00",
    ]


def test_a_line_of_a_log_is_never_wrapped(tmp_path):
    console = log(width=20)
    with Report(tmp_path, total_steps=1, console=console, quiet=True) as report:
        report.warning("word " * 30)
    assert len(console.file.getvalue().splitlines()) == 1


def test_a_terminal_gets_a_bar_that_says_when_it_compiles_and_when_it_is_done(tmp_path):
    console, clock = terminal(), Clock()
    with Report(tmp_path, total_steps=3, console=console, clock=clock) as report:
        assert "compiling" in console.file.getvalue()
        run(report, clock, [1, 2])
        with report.phase("evaluating"):
            report.message("above the bar")
        run(report, clock, [3], compiling=1.0)
    shown = console.file.getvalue()
    assert "above the bar" in shown
    last = shown.splitlines()[-2]  # the last one shows the cursor again
    assert "done" in last
    assert "3/3" in last
    assert "loss 1.000  100 tokens/s" in last


def test_on_80_columns_the_bar_shortens_and_no_number_does(tmp_path):
    console, clock = terminal(), Clock()
    with Report(tmp_path, total_steps=9000, console=console, clock=clock) as report:
        run(report, clock, [1, 2, 3], seconds=1e-3)
        with report.phase("evaluating"):
            pass
    assert "…" not in console.file.getvalue()


def test_a_run_that_fails_leaves_a_bar_that_says_so(tmp_path):
    console = terminal()
    with pytest.raises(KeyboardInterrupt), Report(tmp_path, total_steps=3, console=console):
        raise KeyboardInterrupt
    assert "stopped" in console.file.getvalue()


def test_the_time_left_knows_evaluations_but_not_compilation():
    clock = Clock()
    pace = Throughput(10, clock)
    clock.now = 100.0
    pace.add(1, 1.0, 50.0, 100.0)
    assert pace.left is None
    assert pace.tokens_per_second is None
    clock.now += 2.0 + 4.0  # a step, then an evaluation
    pace.add(2, 1.0, 50.0, 2.0)
    assert pace.left == 6.0 * 8
    assert pace.tokens_per_second == 25.0


def test_the_smoothed_loss_starts_unbiased_and_ignores_what_is_not_finite():
    pace = Throughput(10, Clock())
    pace.add(1, math.nan, 1.0, 1.0)
    assert math.isnan(pace.loss)
    pace.add(2, 3.0, 1.0, 1.0)
    pace.add(3, math.inf, 1.0, 1.0)
    assert pace.loss == pytest.approx(3.0)


def test_after_a_resume_the_time_left_counts_the_steps_that_remain(tmp_path):
    console, clock = log(), Clock()
    with Report(tmp_path, total_steps=30, start_step=10, console=console, clock=clock) as report:
        run(report, clock, range(11, 21))
    assert "step 11/30  loss" in console.file.getvalue()
    assert "step 20/30" in console.file.getvalue()
    assert "0:10 left" in console.file.getvalue()


def test_quiet_shows_warnings_alone_and_records_everything(tmp_path):
    console, clock = log(), Clock()
    with Report(tmp_path, total_steps=2, console=console, quiet=True, clock=clock) as report:
        run(report, clock, [1, 2])
        report.message("chat")
        report.warning("a target was cut")
    assert console.file.getvalue() == "warning: a target was cut\n"
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_other_processes_show_and_write_nothing(tmp_path):
    console = log()
    directory = tmp_path / "run"
    with Report(directory, total_steps=1, console=console, primary=False) as report:
        report.step(1, metrics(), 1.0)
        report.evaluation(1, {"loss": 1.0})
        report.message("chat")
        report.warning("mind")
        report.plot()
    assert console.file.getvalue() == ""
    assert not directory.exists()


def test_messages_and_warnings_cannot_steer_the_terminal(tmp_path):
    console = log()
    with Report(tmp_path, total_steps=1, console=console) as report:
        report.message("labels: '\x1b[2J'")
        report.warning("\u202e.txt")
        report.evaluation(1, {"\x9b2J.loss": 1.0})
    assert console.file.getvalue().splitlines() == [
        r"labels: '\x1b[2J'",
        r"warning: \u202e.txt",
        r"step 1/1  dev: \u009b2J.loss 1.0000",
    ]


def test_text_that_the_terminal_cannot_encode_is_shown_as_far_as_it_goes(tmp_path):
    shown = io.BytesIO()
    file = io.TextIOWrapper(shown, encoding="ascii")
    console = Console(file=file, color_system=None)
    with Report(tmp_path, total_steps=1, console=console) as report:
        report.message("a café")
        report.message("[b]and[/b] on")
    file.flush()
    assert shown.getvalue().decode().splitlines() == [r"a caf\xe9", "[b]and[/b] on"]


def test_a_curve_that_cannot_be_drawn_is_a_warning(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("prefix_jax.runs.console.plot_loss", broken)
    console = log()
    with Report(tmp_path, total_steps=1, console=console) as report:
        run(report, Clock(), [1])
        report.plot()
    assert f"warning: {tmp_path}/loss.png was not drawn: no fonts" in console.file.getvalue()


def test_a_display_that_breaks_stops_nothing(tmp_path):
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError("the terminal went away")

    console, clock = Console(file=Broken()), Clock()
    with Report(tmp_path, total_steps=2, console=console, clock=clock) as report:
        run(report, clock, [1, 2])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
