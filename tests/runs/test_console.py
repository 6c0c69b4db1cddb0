"""The console shows progress on a terminal and in a log, whatever happens to the display."""

import io
import math

import pytest
import rich.console

from prefix_jax.runs.console import Console, Throughput


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def metrics(loss=1.0, tokens=100.0):
    return {"loss": loss, "tokens": tokens, "targets": 30.0, "learning_rate": 1e-3}


def log(width=80):
    return rich.console.Console(file=io.StringIO(), width=width, color_system=None)


def terminal(width=80):
    return rich.console.Console(
        file=io.StringIO(), width=width, force_terminal=True, force_interactive=True
    )


def run(console, clock, steps, compiling=60.0, seconds=1.0):
    """Compiles at the first step, then takes equal steps."""
    for step in steps:
        duration = compiling if step == steps[0] else seconds
        clock.now += duration
        console.on_metrics(step, metrics(), duration)


def test_prints_plain_lines_to_a_log(tmp_path):
    output, clock = log(), Clock()
    console = Console(output, clock=clock)
    with console.training(25):
        run(console, clock, range(1, 26))
        console.write(25, "dev", {"loss": 1.25, "bleu": 40.0})
    assert output.file.getvalue().splitlines() == [
        "step  1/25  loss 1.000  lr 1.00e-03  compiled in 60.0 s",
        "step 10/25  loss 1.000  lr 1.00e-03  100 tokens/s  1:09 elapsed  0:15 left",
        "step 20/25  loss 1.000  lr 1.00e-03  100 tokens/s  1:19 elapsed  0:05 left",
        "step 25/25  loss 1.000  lr 1.00e-03  100 tokens/s  1:24 elapsed",
        "step 25/25  dev: loss 1.2500  bleu 40.00",
    ]


def test_never_wraps_a_line_of_a_log():
    output = log(width=20)
    Console(output).warning("word " * 30)
    assert len(output.file.getvalue().splitlines()) == 1


def test_terminal_bar_shows_compilation_and_completion():
    output, clock = terminal(), Clock()
    console = Console(output, clock=clock)
    with console.training(3):
        assert "compiling" in output.file.getvalue()
        run(console, clock, [1, 2])
        with console.phase("evaluating"):
            console.message("above the bar")
        run(console, clock, [3], compiling=1.0)
    shown = output.file.getvalue()
    assert "above the bar" in shown
    last = shown.splitlines()[-2]  # the last line shows the cursor again
    assert "done" in last
    assert "3/3" in last
    assert "loss 1.000  100 tokens/s" in last


def test_80_columns_shorten_the_bar_but_no_number():
    output, clock = terminal(), Clock()
    console = Console(output, clock=clock)
    with console.training(9000):
        run(console, clock, [1, 2, 3], seconds=1e-3)
        with console.phase("evaluating"):
            pass
    assert "…" not in output.file.getvalue()


def test_bar_of_a_failed_run_shows_stopped():
    output = terminal()
    with pytest.raises(KeyboardInterrupt), Console(output).training(3):
        raise KeyboardInterrupt
    assert "stopped" in output.file.getvalue()


def test_bar_of_an_interrupted_run_shows_stopped():
    output, clock = terminal(), Clock()
    console = Console(output, clock=clock)
    with console.training(3):
        run(console, clock, [1, 2])
    assert "stopped" in output.file.getvalue().splitlines()[-2]


def test_time_left_includes_evaluations_but_not_compilation():
    clock = Clock()
    throughput = Throughput(10, clock)
    clock.now = 100.0
    throughput.add(1, 1.0, 50.0, 100.0)
    assert throughput.left is None
    assert throughput.tokens_per_second is None
    clock.now += 2.0 + 4.0  # a step, then an evaluation
    throughput.add(2, 1.0, 50.0, 2.0)
    assert throughput.left == 6.0 * 8
    assert throughput.tokens_per_second == 25.0


def test_smoothed_loss_starts_unbiased_and_ignores_nonfinite_values():
    throughput = Throughput(10, Clock())
    throughput.add(1, math.nan, 1.0, 1.0)
    assert math.isnan(throughput.loss)
    throughput.add(2, 3.0, 1.0, 1.0)
    throughput.add(3, math.inf, 1.0, 1.0)
    assert throughput.loss == pytest.approx(3.0)


def test_time_left_after_a_resume_counts_only_remaining_steps():
    output, clock = log(), Clock()
    console = Console(output, clock=clock)
    with console.training(30, start_step=10):
        run(console, clock, range(11, 21))
    assert "step 11/30  loss" in output.file.getvalue()
    assert "step 20/30" in output.file.getvalue()
    assert "0:10 left" in output.file.getvalue()


def test_quiet_shows_nothing():
    output, clock = log(), Clock()
    console = Console(output, quiet=True, clock=clock)
    with console.training(2), console.status("loading"):
        run(console, clock, [1, 2])
        console.message("chat")
        console.warning("a target was cut")
    assert output.file.getvalue() == ""


def test_other_processes_show_nothing():
    output = log()
    console = Console(output, primary=False)
    with console.training(1), console.status("loading"):
        console.on_metrics(1, metrics(), 1.0)
        console.write(1, "dev", {"loss": 1.0})
        console.message("chat")
        console.warning("mind")
    assert output.file.getvalue() == ""


def test_escapes_control_characters():
    output = log()
    console = Console(output)
    with console.training(1):
        console.message("labels: '\x1b[2J'")
        console.warning("\u202e.txt")
        console.write(1, "dev", {"\x9b2J.loss": 1.0})
    assert output.file.getvalue().splitlines() == [
        r"labels: '\x1b[2J'",
        r"warning: \u202e.txt",
        r"step 1/1  dev: \u009b2J.loss 1.0000",
    ]


def test_replaces_text_that_the_terminal_cannot_encode():
    shown = io.BytesIO()
    file = io.TextIOWrapper(shown, encoding="ascii")
    console = Console(rich.console.Console(file=file, color_system=None))
    console.message("a café")
    console.message("[b]and[/b] on")
    file.flush()
    assert shown.getvalue().decode().splitlines() == [r"a caf\xe9", "[b]and[/b] on"]


def test_broken_display_does_not_stop_a_run():
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError("the terminal went away")

    for output in (rich.console.Console(file=Broken()), terminal()):
        output.file = Broken()
        clock = Clock()
        console = Console(output, clock=clock)
        with console.status("loading"):
            pass
        with console.training(2):
            run(console, clock, [1, 2])
            console.write(2, "dev", {"loss": 1.0})
