"""A wrong argument is reported in one line that says what was meant."""

import pytest

from prefix_jax.cli.main import main


def refused(capsys, *words):
    """The message on standard error of a command that is refused."""
    with pytest.raises(SystemExit, match="2"):
        main(list(words))
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_without_a_verb_the_help_is_shown(capsys):
    err = refused(capsys)
    assert err.startswith("usage: prefix-jax ")
    assert "Generate text" in err


@pytest.mark.parametrize(
    ("verb", "meant"),
    [
        ("trian", "train"),
        ("inspct", "inspect"),
        ("configs/x.yaml", "'prefix-jax train configs/x.yaml'"),
    ],
)
def test_an_unknown_verb_names_the_nearest_one_and_shows_the_help(capsys, verb, meant):
    first, *rest = refused(capsys, verb, "x").splitlines()
    assert first == f"error: unknown verb '{verb}' (did you mean {meant}?)"
    assert any("Generate text" in line for line in rest)


def test_an_unknown_verb_cannot_steer_the_terminal(capsys):
    assert "\x1b" not in refused(capsys, "\x1b[2J")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "c.yaml", "--train.steps=5"], "settings have no dashes, write train.steps=5"),
        (["train", "c.yaml", "--train.steps", "5"], "settings have no dashes, write train.steps=5"),
        (["train", "c.yaml", "--train.steps"], "settings have no dashes, write train.steps=…"),
        (["train", "c.yaml", "--output=o"], "settings have no dashes, write output=o"),
        (["generate", "run", "-decode.beams=5"], "settings have no dashes, write decode.beams=5"),
        (["generate", "run", "--promt", "x"], "(did you mean --prompt?)"),
        (["generate", "run", "--promt=x"], "(did you mean --prompt?)"),
        (["export", "run", "out", "--bakee"], "(did you mean --bake?)"),
        (["train", "--profile", "c.yaml"], "argument --profile: expected a whole number, got"),
        (["train", "c.yaml", "--profile", "x"], "write --profile=5, or put the option last"),
        (["train"], "required: CONFIG"),
    ],
)
def test_a_wrong_argument_is_one_line_with_its_remedy(capsys, words, message):
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
def test_only_one_config_or_prefix_is_accepted(capsys, words, message):
    if message is None:
        assert "unrecognized arguments: x" in refused(capsys, *words)
        return
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "write what differs as key.path=value" in err
