import subprocess
import sys
import types

import pytest

from prefix_jax.cli import main as cli
from prefix_jax.errors import ConfigError


@pytest.fixture
def verb(monkeypatch):
    """Makes `prefix-jax probe` the only verb; its `run` is what the test gives it."""
    module = types.ModuleType("prefix_jax.cli.probe", "Probe the command line.\n\nAt length.")
    module.add_arguments = lambda parser: parser.add_argument("--word", default="none")
    monkeypatch.setitem(sys.modules, "prefix_jax.cli.probe", module)
    found = [types.SimpleNamespace(name=name) for name in ("main", "_shared", "probe")]
    monkeypatch.setattr(cli.pkgutil, "iter_modules", lambda path: found)
    return module


def raising(error):
    def run(args):
        raise error

    return run


def test_a_verb_gets_its_arguments_and_gives_the_exit_code(verb):
    verb.run = lambda args: 7 if args.word == "seven" else 0
    assert cli.main(["probe", "--word", "seven"]) == 7


def test_an_error_of_the_user_is_one_line_on_stderr(verb, capsys):
    verb.run = raising(ConfigError("optim.clip: expected float"))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr() == ("", "error: optim.clip: expected float\n")


def test_an_error_cannot_steer_the_terminal(verb, capsys):
    verb.run = raising(ConfigError("no tensor 'a\x1b[2J\x9b\u202e'"))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == r"error: no tensor 'a\x1b[2J\u009b\u202e'" + "\n"


def test_an_error_of_ours_keeps_its_traceback(verb):
    verb.run = raising(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_an_interrupt_is_no_traceback(verb, capsys):
    verb.run = raising(KeyboardInterrupt())
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_lists_the_verbs_by_the_first_line_of_their_docstring(verb, capsys):
    verb.run = raising(AssertionError())
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert "probe" in (out := capsys.readouterr().out)
    assert "Probe the command line\n" in out


def test_no_verb_is_a_usage_error(verb, capsys):
    verb.run = raising(AssertionError())
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "VERB" in capsys.readouterr().err


def test_the_command_line_is_read_without_importing_jax():
    script = (
        "import sys; from prefix_jax.cli.main import _parser; _parser();"
        "print({'jax', 'transformers', 'numpy', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_a_reader_that_goes_away_is_no_error():
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
    # What the command sets is undone as well.
    monkeypatch.setattr(cli.os, "environ", dict(cli.os.environ))


def test_compiled_programs_are_kept_in_the_cache_of_the_user(no_cache_settings, tmp_path):
    cli.os.environ["XDG_CACHE_HOME"] = str(tmp_path)
    cli._keep_programs()
    kept = tmp_path / "prefix_jax" / "programs"
    assert kept.is_dir()
    assert cli.os.environ["JAX_COMPILATION_CACHE_DIR"] == str(kept)
    assert int(cli.os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]) > 0


def test_a_cache_that_was_chosen_stays(no_cache_settings, tmp_path):
    cli.os.environ["XDG_CACHE_HOME"] = str(tmp_path)
    cli.os.environ["JAX_COMPILATION_CACHE_DIR"] = "elsewhere"
    cli._keep_programs()
    assert cli.os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in cli.os.environ


def test_without_a_place_to_write_nothing_is_kept(no_cache_settings, tmp_path):
    (tmp_path / "file").touch()
    cli.os.environ["XDG_CACHE_HOME"] = str(tmp_path / "file")
    cli._keep_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in cli.os.environ
