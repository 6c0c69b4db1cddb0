"""Untrusted text cannot control the terminal that shows it."""

import io
import sys

import pytest
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from prefix_jax import terminal
from prefix_jax.terminal.console import guard, make_console, text

HOSTILE = "a\x1b[2J\x07\x9b2J\x7f\r\u202eb\u2066c\x00"
SHOWN = r"a\x1b[2J\x07\u009b2J\u007f\x0d\u202eb\u2066c\x00"


def test_control_and_bidirectional_characters_become_visible():
    assert terminal.escape(HOSTILE) == SHOWN


@pytest.mark.parametrize("plain", ["tab\tand\nnewline", "ünï → 語 🎈", "עברית\u200e", "[bold]x[/]"])
def test_ordinary_text_is_unchanged(plain):
    assert terminal.escape(plain) == plain


def test_surrogates_become_visible():
    assert terminal.escape("\ud800").encode() == rb"\ud800"


def test_escaped_json_is_still_json():
    import json

    value = {"name": "\x9b2J\x7f\u202e\x1b"}
    assert json.loads(terminal.escape(json.dumps(value, ensure_ascii=False))) == value


@pytest.mark.parametrize("is_terminal", [True, False])
def test_only_a_terminal_receives_escaped_text(monkeypatch, is_terminal):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    assert terminal.printable(HOSTILE, stream) == (SHOWN if is_terminal else HOSTILE)


def test_errors_and_warnings_are_escaped(capsys):
    terminal.print_error(HOSTILE)
    terminal.print_warning(f"one\n{HOSTILE}")
    assert capsys.readouterr().err == f"error: {SHOWN}\nwarning: one\n{SHOWN}\n"


def test_truncates_very_long_errors(capsys):
    terminal.print_error("x" * 10**6)
    err = capsys.readouterr().err
    assert len(err) < 6000
    assert err.endswith("x… (1,000,007 characters)\n")


def test_printing_an_error_to_a_closed_stream_does_not_raise(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    terminal.print_error("lost")


def printed(console, *things, **options):
    console.print(*things, **options)
    return console.file.getvalue()


@pytest.mark.parametrize("make", [make_console, lambda **options: guard(Console(**options))])
def test_console_escapes_text_markup_and_tables(make):
    def console():
        return make(file=io.StringIO(), width=200, force_terminal=True, color_system=None)

    assert printed(console(), text(HOSTILE)) == f"{SHOWN}\n"
    # Rich itself drops BEL and CR.
    assert printed(console(), "\x1b[2J\x07\r\x9b", markup=False) == "\\x1b[2J\\u009b\n"
    table = Table("column", title=HOSTILE)
    table.add_row(HOSTILE)
    shown = printed(console(), table)
    assert shown.count(r"\x1b[2J") == 2
    assert "\x1b" not in shown


def test_console_keeps_its_own_colors():
    console = make_console(file=io.StringIO(), force_terminal=True, color_system="standard")
    assert printed(console, "[red]x[/]") == "\x1b[31mx\x1b[0m\n"


def test_console_escapes_text_printed_above_a_progress_bar():
    console = make_console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with Progress(console=console) as bar:
        bar.add_task("working", total=2)
        console.print(text(HOSTILE))
    shown = console.file.getvalue()
    assert "working" in shown
    assert SHOWN in shown
    assert "\x1b[?25l" in shown  # hides the cursor: rich's own control


def test_guarding_a_console_twice_has_no_effect():
    console = make_console(file=io.StringIO())
    assert printed(guard(guard(console)), text("\x1b")) == "\\x1b\n"


def test_table_text_is_never_read_as_markup():
    assert text("[/] [red]").plain == "[/] [red]"


def test_console_replaces_characters_outside_its_encoding():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = make_console(file=file, width=80)
    console.print("more…  3 × 語")
    file.flush()
    assert file.buffer.getvalue() == b"more...  3 x \\u8a9e\n"
