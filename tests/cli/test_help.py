"""The help of every command."""

import dataclasses
import pkgutil

import pytest

import prefix_jax.cli
from prefix_jax.cli.main import main
from prefix_jax.config import DecodeConfig

COMMANDS = [
    info.name
    for info in pkgutil.iter_modules(prefix_jax.cli.__path__)
    if info.name != "main" and not info.name.startswith("_")
]


def test_finds_the_commands():
    assert {"train", "evaluate", "generate", "export", "inspect", "doctor"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert out.startswith(f"usage: prefix-jax {command} ")
    assert max(map(len, out.splitlines())) <= 100


def test_generate_help_names_every_decoding_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    words = capsys.readouterr().out.replace(",", " ").replace(".", " ").split()
    assert {field.name for field in dataclasses.fields(DecodeConfig)} <= set(words)


def test_prints_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("prefix-jax")


def test_unknown_option_is_a_usage_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "run", "--promt", "x"])
    assert "unrecognized arguments: --promt" in capsys.readouterr().err
