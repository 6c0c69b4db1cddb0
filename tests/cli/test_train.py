"""`train` ends with what was gained and how to use it, and goes on where it was interrupted."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from prefix_jax import config
from prefix_jax.cli import train as verb
from prefix_jax.runs import run as fitting
from prefix_jax.runs.console import Report
from prefix_jax.runs.lock import FileLock


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


@pytest.mark.parametrize("change", ["gone", "other fields", "empty"])
def test_results_are_shown_when_the_held_out_data_have_changed(run_in, folder, trained, change):
    shutil.copytree(trained[0] / "run", folder / "run")
    data = folder / "test.jsonl"
    data.unlink() if change == "gone" else data.write_text("" if change == "empty" else "{}\n")
    ran = run_in(folder, "train", "config.yaml")
    assert ran.code == 0, ran.err
    assert "token loss (nats)" in ran.out
    assert ran.out.endswith("  prefix-jax generate run/prefix\n")


def test_edited_predictions_are_one_error(run_in, folder, trained):
    shutil.copytree(trained[0] / "run", folder / "run")
    (folder / "run" / "predictions.jsonl").write_text('{"prediction": 1}\n')
    ran = run_in(folder, "train", "config.yaml")
    assert ran.code == 2
    assert ran.err.startswith("error: run/results.json cannot be read (run/predictions.jsonl:1: ")


def test_a_locked_output_is_refused(run_in, folder):
    lock = FileLock(folder / "run")
    lock.acquire()
    ran = run_in(folder, "train", "config.yaml")
    lock.release()
    assert ran.code == 2
    assert ran.err.startswith("error: run: another run is writing there (pid ")
    assert not (folder / "run").exists()


def test_of_two_processes_the_second_is_refused_and_the_first_goes_on(folder):
    def start() -> subprocess.Popen[str]:
        often = ("train.steps=1000000", "train.checkpoint_every=1000", "train.log_every=1000")
        words = ["train", "config.yaml", *often]
        return subprocess.Popen(
            [sys.executable, "-m", "prefix_jax.cli.main", *words],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with start() as first:
        # A line that is printed before the first step.
        while "step" not in (line := first.stdout.readline()):
            assert line, first.stderr.read()
        with start() as second:
            out, err = second.communicate()
        first.send_signal(signal.SIGTERM)
        first.communicate()
    assert (second.returncode, out) == (2, "")
    assert err.startswith(f"error: run: another run is writing there (pid {first.pid} on ")
    assert first.returncode == 128 + signal.SIGTERM
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if line["kind"] == "train"]
    assert steps == [*range(1, len(steps) + 1)]
    assert not (folder / "run" / ".prefix-jax.lock").exists()


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
