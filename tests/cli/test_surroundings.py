"""Failures of the machine: streams, signals, folders, memory and JAX's environment."""

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

# The command line with a `doctor` that executes its first argument as Python.
COMMAND = (
    "import signal, sys, time; from prefix_jax.cli import doctor, main;"
    "code = sys.argv.pop(1); doctor.run = lambda args: exec(code, globals()) or 0;"
    "sys.exit(main.main())"
)
LONG = "print('x' * 99999)"


def command(code, *words, shell='exec "$@"', **options):
    """Runs the command line through a shell, which can redirect its streams."""
    words = ["sh", "-c", shell, "sh", sys.executable, "-c", COMMAND, code, *(words or ["doctor"])]
    return subprocess.run(words, capture_output=True, text=True, timeout=100, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("code", "words"),
    [("print('x')", ()), (LONG, ()), ("", ["--help"]), ("", ["--version"])],
)
def test_full_standard_output_is_one_error(code, words):
    done = command(code, *words, shell='exec "$@" > /dev/full')
    assert done.returncode == 2
    assert done.stderr == (
        "error: cannot read or write: No space left on device; free disk space (standard output "
        "may be redirected to the full disk)\n"
    )


@pytest.mark.parametrize("shell", ['exec "$@" >&-', 'exec "$@" <&- >&-', 'exec "$@" <&- >&- 2>&-'])
def test_closed_streams_are_not_an_error(shell):
    done = command(f"{LONG}; assert sys.stdin.isatty() is False", shell=shell)
    assert (done.returncode, done.stderr) == (0, "")


def test_full_standard_error_still_gives_the_exit_code():
    assert command("raise MemoryError", shell='exec "$@" 2> /dev/full').returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_needs_no_unicode(encoding):
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = command("", "evaluate", "--help", env=env)
    assert done.returncode == 0
    assert "NAME,..." in done.stdout


def test_bug_prints_a_traceback_and_asks_for_a_report():
    done = command("raise ZeroDivisionError('\\x1b[2J')")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith(f"\n{_failures.REPORT}\n")
    assert "\x1b" not in done.stderr


def test_interrupt_is_one_line():
    done = command("signal.raise_signal(signal.SIGINT)")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("where", ["__del__", "callback"])
def test_interrupt_in_the_garbage_collector_is_not_lost(where):
    make = {
        "__del__": "type('X', (), {'__del__': lambda self: signal.raise_signal(signal.SIGINT)})()",
        "callback": "(gc.callbacks.append(lambda *_: (gc.callbacks.clear(),"
        "signal.raise_signal(signal.SIGINT))), gc.collect())",
    }
    done = command(f"import gc; {make[where]}; time.sleep(50)")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_interrupt_during_import_is_one_line(tmp_path):
    # Like extension modules, which replace the interrupt with another error.
    (tmp_path / "module.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt:\n    raise ImportError('not initialized') from None\n"
    )
    done = command(f"sys.path.append({str(tmp_path)!r}); print('first'); import module")
    assert (done.returncode, done.stdout, done.stderr) == (130, "first\n", "interrupted\n")


def test_interrupt_during_shutdown_prints_no_traceback():
    code = "import atexit; atexit.register(signal.raise_signal, signal.SIGINT)"
    done = command(code)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_deleted_current_directory_is_one_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert cli.main(["doctor"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the current directory cannot be used (No such file or directory)")


def test_sets_a_missing_home(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(cli.os, "environ", dict(cli.os.environ))
    cli.os.environ.pop("HOME", None)
    cli._set_missing_home()
    assert Path.home() == Path("/nonexistent")


def test_keeps_an_existing_home(monkeypatch, tmp_path):
    monkeypatch.setattr(cli.os, "environ", {"HOME": str(tmp_path)})
    cli._set_missing_home()
    assert cli.os.environ == {"HOME": str(tmp_path)}


def test_unknown_jax_backend_is_one_error(files):
    config = str(files / "config.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "prefix_jax.cli.main", "train", config, "output_dir=other"],
        env={**os.environ, "JAX_PLATFORMS": "foo"},
        cwd=files,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2, done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: JAX found no device: Unable to initialize backend 'foo'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "variable",
    ["JAX_LOG_COMPILES", "JAX_COMPILATION_CACHE_MAX_SIZE", "JAX_DEFAULT_MATMUL_PRECISION"],
)
def test_invalid_jax_environment_variable_is_one_error(variable):
    done = command("import jax", env={**os.environ, variable: "wrong"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: JAX rejected a JAX_… environment variable: ")
    assert done.stderr.count("\n") == 1


def test_ignores_the_64_bit_defaults_of_jax():
    code = "import jax; print(jax.numpy.ones(1).dtype)"
    done = command(code, env={**os.environ, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "float32\n", "")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "the host is out of memory; use a smaller model"),
        (MemoryError("Unable to allocate 8 GiB"), "out of memory (Unable to allocate 8 GiB)"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), "a device is out"),
        (RuntimeError("Unknown backend foo"), "JAX found no device: Unknown backend foo"),
        (PermissionError(errno.EACCES, "Permission denied", "a.txt"), "a.txt: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), "free disk space"),
        (OSError("odd"), "cannot read or write: odd"),
        (ModuleNotFoundError("No module named 'jinja2'", name="jinja2"), "prefix-jax doctor"),
        (ModuleNotFoundError("No module named 'x'", name="prefix_jax.x"), None),
        (RuntimeError("a shape"), None),
        (ValueError("a shape"), None),
    ],
)
def test_distinguishes_machine_failures_from_bugs(error, message):
    described = _failures.describe(error)
    assert described is None if message is None else message in described
