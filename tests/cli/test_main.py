import subprocess
import sys
import types

import pytest

from prefix_jax.cli import main as cli
from prefix_jax.errors import ConfigError


@pytest.fixture
def probe(monkeypatch):
    """Makes `prefix-jax probe` the only command; tests set its `run`."""
    module = types.ModuleType("prefix_jax.cli.probe", "Probe the command line.\n\nAt length.")
    module.add_arguments = lambda parser: parser.add_argument("--word", default="none")
    monkeypatch.setitem(sys.modules, "prefix_jax.cli.probe", module)
    modules = [types.SimpleNamespace(name=name) for name in ("main", "_shared", "probe")]
    monkeypatch.setattr(cli.pkgutil, "iter_modules", lambda path: modules)
    return module


def raising(error):
    def run(args):
        raise error

    return run


def test_command_receives_arguments_and_returns_the_exit_code(probe):
    probe.run = lambda args: 7 if args.word == "seven" else 0
    assert cli.main(["probe", "--word", "seven"]) == 7


def test_user_error_is_one_line_on_stderr(probe, capsys):
    probe.run = raising(ConfigError("optim.clip_norm: must be a number"))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr() == ("", "error: optim.clip_norm: must be a number\n")


def test_error_text_is_escaped(probe, capsys):
    probe.run = raising(ConfigError("no tensor 'a\x1b[2J\x9b\u202e'"))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == r"error: no tensor 'a\x1b[2J\u009b\u202e'" + "\n"


def test_bug_keeps_its_traceback(probe):
    probe.run = raising(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_interrupt_prints_no_traceback(probe, capsys):
    probe.run = raising(KeyboardInterrupt())
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_lists_the_commands_with_the_first_docstring_line(probe, capsys):
    probe.run = raising(AssertionError())
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert "probe" in (out := capsys.readouterr().out)
    assert "Probe the command line\n" in out


def test_missing_command_is_a_usage_error(probe, capsys):
    probe.run = raising(AssertionError())
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "COMMAND" in capsys.readouterr().err


def test_parsing_does_not_import_jax():
    script = (
        "import sys; from prefix_jax.cli.main import _parser; _parser();"
        "print({'jax', 'transformers', 'numpy', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_closed_pipe_is_not_an_error():
    script = (
        "import sys, types; from prefix_jax.cli import doctor, main;"
        "doctor.run = lambda args: [print('x' * 99) for _ in range(9999)] and 0;"
        "sys.exit(main.main(['doctor']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.fixture
def no_cache_settings(monkeypatch):
    for name in list(cli.os.environ):
        if name.startswith(("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")):
            monkeypatch.delenv(name)
    # A copy, which the command may change.
    monkeypatch.setattr(cli.os, "environ", dict(cli.os.environ))


def test_compilation_cache_is_in_the_user_cache(no_cache_settings, tmp_path):
    cli.os.environ["XDG_CACHE_HOME"] = str(tmp_path)
    cli._enable_compilation_cache()
    kept = tmp_path / "prefix_jax" / "programs"
    assert kept.is_dir()
    assert cli.os.environ["JAX_COMPILATION_CACHE_DIR"] == str(kept)
    assert int(cli.os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]) > 0


def test_keeps_a_configured_compilation_cache(no_cache_settings, tmp_path):
    cli.os.environ["XDG_CACHE_HOME"] = str(tmp_path)
    cli.os.environ["JAX_COMPILATION_CACHE_DIR"] = "elsewhere"
    cli._enable_compilation_cache()
    assert cli.os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in cli.os.environ


def test_no_compilation_cache_without_a_writable_folder(no_cache_settings, tmp_path):
    (tmp_path / "file").touch()
    cli.os.environ["XDG_CACHE_HOME"] = str(tmp_path / "file")
    cli._enable_compilation_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in cli.os.environ
