"""The final report: metrics, samples, outputs and the next command."""

import io
import math

from rich.console import Console

from prefix_jax.runs.final_report import (
    Sample,
    comparison,
    duration,
    generations,
    number,
    print_final_report,
)


def shown(renderable, width=80, color=None):
    console = Console(
        file=io.StringIO(), width=width, color_system=color, force_terminal=color is not None
    )
    console.print(renderable)
    return console.file.getvalue()


def test_formats_durations():
    assert [duration(s) for s in (0, 7.4, 59.6, 754, 3723, 360000)] == [
        "0:00",
        "0:07",
        "1:00",
        "12:34",
        "1:02:03",
        "100:00:00",
    ]


def test_formats_losses_with_four_digits_and_percentages_with_two():
    assert number("loss", 1.23456) == "1.2346"
    assert number("bleu", 1.23456) == "1.23"


def test_comparison_has_one_row_per_metric_measured_twice():
    table = comparison({"loss": 3.0, "bleu": 2.0, "chrf": 1.0}, {"loss": 1.5, "bleu": 42.0})
    rows = [line.split() for line in shown(table).splitlines()]
    assert ["token", "loss", "(nats)", "3.0000", "1.5000", "-1.5000"] in rows
    assert ["BLEU", "2.00", "42.00", "+40.00"] in rows
    assert "chrF" not in shown(table)


def test_lower_loss_is_green_and_lower_bleu_is_red():
    green, red = "\x1b[32m", "\x1b[31m"
    assert green in shown(comparison({"loss": 3.0}, {"loss": 1.5}), color="standard")
    assert red in shown(comparison({"bleu": 3.0}, {"bleu": 1.5}), color="standard")
    nan = shown(comparison({"loss": 3.0}, {"loss": math.nan}), color="standard")
    assert green not in nan
    assert red not in nan


def test_shows_before_and_after_side_by_side_within_the_width():
    sample = Sample("name[X]", "X is here.", "before " * 20, "after " * 20)
    for width in (40, 80, 160):
        lines = shown(generations([sample]), width).splitlines()
        assert max(map(len, lines)) <= width
        assert any("before before" in line and "after after" in line for line in lines)


def test_escapes_names_of_tasks():
    text = shown(comparison({}, {"[/]\x1b[2J.loss": 3.0}))
    assert r"[/]\x1b[2J: token loss (nats)" in text
    console = Console(file=io.StringIO(), width=80)
    paths = {"prefix": "run\x1b[2J/[/]"}
    print_final_report(console, before={}, after={}, samples=(), written=paths, command="go\x9b")
    assert console.file.getvalue() == "\nprefix  run\\x1b[2J/[/]\n\nUse it:\n  go\\u009b\n"


def test_escapes_text_of_a_model():
    sample = Sample("[bold]x[/]", "line\nbreak", "\x1b[2J\x07", "")
    text = shown(generations([sample]))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]x[/]" in text
    assert "(nothing)" in text


def test_never_wraps_paths_and_the_command():
    command = "prefix-jax generate --prefix " + "a/very/long/path/" * 10
    console = Console(file=io.StringIO(), width=40)
    print_final_report(
        console,
        before={"loss": 2.0},
        after={"loss": 1.0},
        samples=[Sample("in", "ref", "old", "new"), Sample("in", "yes", None, "no", "answered")],
        written={"prefix": "b" * 100, "loss curve": "c.png"},
        command=command,
    )
    lines = console.file.getvalue().splitlines()
    assert f"  {command}" in lines
    assert "prefix      " + "b" * 100 in lines
    assert "loss curve  c.png" in lines
