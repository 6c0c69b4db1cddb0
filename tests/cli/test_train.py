"""`train` ends with what was gained and how to use it, and goes on where it was interrupted."""

import json
import os
import shlex
import signal

import pytest

from prefix_jax import config
from prefix_jax.cli import train as verb
from prefix_jax.train import fit as fitting
from prefix_jax.train.report import Report


def test_the_end_shows_scores_texts_and_paths(trained):
    folder, ran = trained
    results = json.loads((folder / "run" / "results.json").read_text())["test"]
    for name in ("before", "after"):
        assert f"{results[name]['metrics']['loss']:.4f}" in ran.out
    assert ran.out.count("│ input ") == 3
    assert "name[Stop 0], it's" in ran.out
    for path in ("run/prefix (", "run/checkpoints", "run/metrics.jsonl", "run/loss.png"):
        assert path in ran.out


def test_the_command_that_is_printed_works(run_in, trained):
    folder, ran = trained
    command = ran.out.rstrip().splitlines()[-1]
    program, *words = shlex.split(command)
    assert program == "prefix-jax"
    assert json.loads(words[-1]) == {"facts": "name[Stop 0], it's"}
    assert run_in(folder, *words).code == 0


def test_a_finished_run_is_shown_again_without_training(run_in, trained, monkeypatch):
    folder, first = trained
    monkeypatch.setattr(fitting, "fit", lambda *_, **__: pytest.fail("it trained again"))
    again = run_in(folder, "train", "config.yaml")
    assert again.code == 0
    assert again.out.startswith("The run in run has finished")
    assert again.out.endswith(first.out[first.out.index("╭") :])


def test_a_run_directory_is_not_given_to_another_run(run_in, trained):
    folder, _ = trained
    ran = run_in(folder, "train", "config.yaml", "optim.learning_rate=0.5")
    assert ran.code == 2
    assert "optim.learning_rate" in ran.err
    assert "choose another output" in ran.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(run_in, folder, trained, monkeypatch, number):
    step = Report.step

    def interrupting(self, at, *rest):
        step(self, at, *rest)
        if at == 1:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Report, "step", interrupting)
        stopped = run_in(folder, "train", "config.yaml")
    assert stopped.code == 128 + number
    assert "saved" in stopped.out

    ended = run_in(folder, "train", "config.yaml")
    assert ended.code == 0
    assert "continuing after step" in ended.out
    uninterrupted = json.loads((trained[0] / "run" / "results.json").read_text())
    assert json.loads((folder / "run" / "results.json").read_text()) == uninterrupted


def test_an_interrupt_before_the_first_step_is_no_traceback(run_in, folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "fit", interrupted)
    ran = run_in(folder, "train", "config.yaml")
    assert ran.code == 130
    assert ran.err.startswith("interrupted; the same command goes on from the last checkpoint")


def test_without_a_test_split_the_end_shows_what_there_is(run_in, folder):
    ran = run_in(
        folder, "train", "config.yaml", "data.test=null", "data.input=null", "train.steps=1"
    )
    assert ran.code == 0
    assert "token loss (nats)" in ran.out
    assert "change" not in ran.out
    assert "╭" not in ran.out
    assert ran.out.endswith("  prefix-jax generate run/prefix\n")


def test_a_chat_is_used_from_its_first_question(folder):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (folder / "chat.jsonl").write_text(json.dumps({"chat": turns}) + "\n")
    chat = f"data.test={folder / 'chat.jsonl'}"
    settings = ["data.input=null", "data.target=null", "data.messages=chat", chat]
    run = config.load(folder / "config.yaml", [*settings, f"output={folder / 'run'}"])
    (folder / "run" / "prefix").mkdir(parents=True)
    words = shlex.split(verb._command(folder / "run", run))
    assert json.loads(words[-1]) == {"chat": turns[:1]}


@pytest.mark.parametrize(
    ("called", "found", "typed"),
    [
        (".venv/bin/prefix-jax", None, ".venv/bin/prefix-jax"),
        ("/opt/bin/prefix-jax", "/opt/bin/prefix-jax", "prefix-jax"),
        ("/opt/bin/prefix-jax", "/usr/bin/prefix-jax", "/opt/bin/prefix-jax"),
        ("/usr/bin/pytest", None, "prefix-jax"),
    ],
)
def test_the_program_is_named_as_it_was_called(monkeypatch, called, found, typed):
    monkeypatch.setattr(verb.sys, "argv", [called])
    monkeypatch.setattr(verb.shutil, "which", lambda _: found)
    assert verb._executable() == typed
