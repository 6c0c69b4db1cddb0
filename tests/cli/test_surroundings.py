"""Whatever the machine does, the command line reports it in one line."""

import errno
import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prefix_jax.cli import _failures
from prefix_jax.cli import main as cli

# The command line, whose `doctor` runs a line of Python.
COMMAND = (
    "import signal, sys, time; from prefix_jax.cli import doctor, main;"
    "code = sys.argv.pop(1); doctor.run = lambda args: exec(code, globals()) or 0;"
    "sys.exit(main.main())"
)
LONG = "print('x' * 99999)"


def command(code, *words, shell='exec "$@"', **options):
    """Runs the command line by way of a shell, which may redirect its streams."""
    words = ["sh", "-c", shell, "sh", sys.executable, "-c", COMMAND, code, *(words or ["doctor"])]
    return subprocess.run(words, capture_output=True, text=True, timeout=100, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("code", "words"),
    [("print('x')", ()), (LONG, ()), ("", ["--help"]), ("", ["--version"])],
)
def test_a_full_standard_output_is_one_line(code, words):
    done = command(code, *words, shell='exec "$@" > /dev/full')
    assert done.returncode == 2
    assert done.stderr == (
        "error: cannot read or write: No space left on device; make room on the disk, which may be "
        "that of standard output\n"
    )


@pytest.mark.parametrize("shell", ['exec "$@" >&-', 'exec "$@" <&- >&-', 'exec "$@" <&- >&- 2>&-'])
def test_closed_streams_are_no_error(shell):
    done = command(f"{LONG}; assert sys.stdin.isatty() is False", shell=shell)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_is_told_by_the_exit_code_where_standard_error_is_full():
    assert command("raise MemoryError", shell='exec "$@" 2> /dev/full').returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_needs_no_unicode(encoding):
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = command("", "evaluate", "--help", env=env)
    assert done.returncode == 0
    assert "NAME,..." in done.stdout


def test_a_bug_shows_its_traceback_and_asks_for_a_report():
    done = command("raise ZeroDivisionError('\\x1b[2J')")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith(f"\n{_failures.REPORT}\n")
    assert "\x1b" not in done.stderr


def test_an_interrupt_is_one_line():
    done = command("signal.raise_signal(signal.SIGINT)")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("where", ["__del__", "callback"])
def test_an_interrupt_in_the_garbage_collector_is_not_lost(where):
    make = {
        "__del__": "type('X', (), {'__del__': lambda self: signal.raise_signal(signal.SIGINT)})()",
        "callback": "(gc.callbacks.append(lambda *_: (gc.callbacks.clear(),"
        "signal.raise_signal(signal.SIGINT))), gc.collect())",
    }
    done = command(f"import gc; {make[where]}; time.sleep(50)")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_an_interrupt_while_importing_is_one_line(tmp_path):
    # As extension modules do, which replace the interrupt by an error of their own.
    (tmp_path / "module.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt:\n    raise ImportError('not initialized') from None\n"
    )
    done = command(f"sys.path.append({str(tmp_path)!r}); print('first'); import module")
    assert (done.returncode, done.stdout, done.stderr) == (130, "first\n", "interrupted\n")


def test_an_interrupt_while_shutting_down_is_no_traceback():
    code = "import atexit; atexit.register(signal.raise_signal, signal.SIGINT)"
    done = command(code)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_current_directory_that_was_deleted_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert cli.main(["doctor"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the current directory cannot be used (No such file or directory)")


def test_a_user_without_a_home_can_use_everything(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(cli.os, "environ", dict(cli.os.environ))
    cli.os.environ.pop("HOME", None)
    cli._provide_home()
    assert Path.home() == Path("/nonexistent")


def test_a_home_that_is_known_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(cli.os, "environ", {"HOME": str(tmp_path)})
    cli._provide_home()
    assert cli.os.environ == {"HOME": str(tmp_path)}


def test_a_backend_that_jax_does_not_have_is_one_line(files):
    config = str(files / "config.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "prefix_jax.cli.main", "train", config, "output=other"],
        env={**os.environ, "JAX_PLATFORMS": "foo"},
        cwd=files,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2, done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: JAX finds no device: Unable to initialize backend 'foo'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "variable",
    ["JAX_LOG_COMPILES", "JAX_COMPILATION_CACHE_MAX_SIZE", "JAX_DEFAULT_MATMUL_PRECISION"],
)
def test_a_wrong_environment_variable_of_jax_is_one_line(variable):
    done = command("import jax", env={**os.environ, variable: "wrong"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: JAX refuses an environment variable JAX_…: ")
    assert done.stderr.count("\n") == 1


def test_64_bit_defaults_of_jax_are_not_used():
    code = "import jax; print(jax.numpy.ones(1).dtype)"
    done = command(code, env={**os.environ, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "float32\n", "")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "the host is out of memory; use a smaller model"),
        (MemoryError("Unable to allocate 8 GiB"), "out of memory (Unable to allocate 8 GiB)"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), "a device is out"),
        (RuntimeError("Unknown backend foo"), "JAX finds no device: Unknown backend foo"),
        (PermissionError(errno.EACCES, "Permission denied", "a.txt"), "a.txt: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), "make room"),
        (OSError("odd"), "cannot read or write: odd"),
        (ModuleNotFoundError("No module named 'jinja2'", name="jinja2"), "prefix-jax doctor"),
        (ModuleNotFoundError("No module named 'x'", name="prefix_jax.x"), None),
        (RuntimeError("a shape"), None),
        (ValueError("a shape"), None),
    ],
)
def test_failures_of_the_machine_are_told_from_bugs(error, message):
    described = _failures.describe(error)
    assert described is None if message is None else message in described
