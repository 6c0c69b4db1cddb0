"""Mistakes in the arguments are reported in one line, with a suggestion."""

import pytest

from prefix_jax.cli.main import main


def refused(capsys, *words):
    """Runs a command that must fail; returns its standard error."""
    with pytest.raises(SystemExit, match="2"):
        main(list(words))
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_shows_the_help_without_a_command(capsys):
    err = refused(capsys)
    assert err.startswith("usage: prefix-jax ")
    assert "Generate text" in err


@pytest.mark.parametrize(
    ("command", "suggestion"),
    [
        ("trian", "train"),
        ("inspct", "inspect"),
        ("configs/x.yaml", "'prefix-jax train configs/x.yaml'"),
    ],
)
def test_unknown_command_suggests_the_nearest_and_shows_the_help(capsys, command, suggestion):
    first, *rest = refused(capsys, command, "x").splitlines()
    assert first == f"error: unknown command '{command}' (did you mean {suggestion}?)"
    assert any("Generate text" in line for line in rest)


def test_unknown_command_is_escaped(capsys):
    assert "\x1b" not in refused(capsys, "\x1b[2J")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "c.yaml", "--train.steps=5"], "settings have no dashes, write train.steps=5"),
        (["train", "c.yaml", "--train.steps", "5"], "settings have no dashes, write train.steps=5"),
        (["train", "c.yaml", "--train.steps"], "settings have no dashes, write train.steps=…"),
        (["train", "c.yaml", "--output_dir=o"], "settings have no dashes, write output_dir=o"),
        (
            ["generate", "run", "-decode.num_beams=5"],
            "settings have no dashes, write decode.num_beams=5",
        ),
        (["generate", "run", "--promt", "x"], "(did you mean --prompt?)"),
        (["generate", "run", "--promt=x"], "(did you mean --prompt?)"),
        (["export", "run", "out", "--bakee"], "(did you mean --bake?)"),
        (["train", "--profile", "c.yaml"], "argument --profile: expected an integer, got"),
        (["train", "c.yaml", "--profile", "x"], "write --profile=5, or put the option last"),
        (["train"], "required: CONFIG"),
        (["generate", "--prompt", "x"], "required: PREFIX;"),
    ],
)
def test_wrong_argument_is_one_line_with_its_fix(capsys, words, message):
    err = refused(capsys, *words)
    assert err.startswith("error: ")
    assert err.endswith(f"; see 'prefix-jax {words[0]} --help'\n")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "a.yaml", "b.yaml"], "expected one CONFIG, got 'a.yaml', 'b.yaml'"),
        (["train", "a.yaml", "x=1", "b.yml"], "expected one CONFIG, got 'a.yaml', 'b.yml'"),
        (["plan", "a.yaml", "b.yaml", "--topology", "v5e:1x1"], "expected one CONFIG"),
        (["inspect", "run", "x"], None),
        (["evaluate", "run", ".", "--data", "x.jsonl"], "expected one PREFIX, got 'run', '.'"),
    ],
)
def test_accepts_only_one_config_or_prefix(capsys, words, message):
    if message is None:
        assert "unrecognized arguments: x" in refused(capsys, *words)
        return
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "write changes as key.path=value" in err
