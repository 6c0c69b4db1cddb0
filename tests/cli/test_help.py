"""Every verb explains itself."""

import dataclasses
import pkgutil

import pytest

import prefix_jax.cli
from prefix_jax.cli.main import main
from prefix_jax.config import DecodeConfig

VERBS = [
    info.name
    for info in pkgutil.iter_modules(prefix_jax.cli.__path__)
    if info.name != "main" and not info.name.startswith("_")
]


def test_the_verbs_are_there():
    assert {"train", "evaluate", "generate", "export", "inspect", "doctor"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_says_what_it_does_and_takes(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    out = capsys.readouterr().out
    assert out.startswith(f"usage: prefix-jax {verb} ")
    assert max(map(len, out.splitlines())) <= 100


def test_generate_names_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    words = capsys.readouterr().out.replace(",", " ").replace(".", " ").split()
    assert {field.name for field in dataclasses.fields(DecodeConfig)} <= set(words)


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("prefix-jax")


def test_an_unknown_option_is_a_usage_error_of_its_verb(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "run", "--promt", "x"])
    assert "unrecognized arguments: --promt" in capsys.readouterr().err
