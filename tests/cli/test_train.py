"""`prefix-jax train`: the final report, resuming, locking and signals."""

import json
import os
import shlex
import shutil
import signal

import pytest
from forked import ForkedProcess

from prefix_jax import config
from prefix_jax.cli import train as command
from prefix_jax.cli.main import main
from prefix_jax.runs import run as run_module
from prefix_jax.runs.console import Console
from prefix_jax.runs.lock import FileLock
from prefix_jax.tasks import make_task


def test_final_report_shows_scores_texts_and_paths(trained):
    folder, ran = trained
    results = json.loads((folder / "run" / "results.json").read_text())["test"]
    for name in ("before", "after"):
        assert f"{results[name]['metrics']['loss']:.4f}" in ran.out
    assert ran.out.count("│ input ") == 3
    assert "name[Stop 0], it's" in ran.out
    for path in ("run/prefix (", "run/checkpoints", "run/metrics.jsonl", "run/loss.png"):
        assert path in ran.out


def test_printed_command_works(run_in, trained):
    folder, ran = trained
    program, *words = shlex.split(ran.out.rstrip().splitlines()[-1])
    assert program == "prefix-jax"
    assert json.loads(words[-1]) == {"facts": "name[Stop 0], it's"}
    assert run_in(folder, *words).code == 0


def test_finished_run_is_shown_without_training(run_in, trained, monkeypatch):
    folder, first = trained
    monkeypatch.setattr(run_module, "run", lambda *_, **__: pytest.fail("it trained again"))
    again = run_in(folder, "train", "config.yaml")
    assert again.code == 0
    assert again.out.startswith("The run in run has finished")
    assert again.out.endswith(first.out[first.out.index("╭") :])


def test_rejects_the_directory_of_another_run(run_in, trained):
    folder, _ = trained
    ran = run_in(folder, "train", "config.yaml", "optim.learning_rate=0.5")
    assert ran.code == 2
    assert "optim.learning_rate" in ran.err
    assert "choose another output" in ran.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_same_command_resumes(run_in, folder, trained, monkeypatch, number):
    on_metrics = Console.on_metrics

    def interrupting(self, step, *rest):
        stop = on_metrics(self, step, *rest)
        if step == 1:
            os.kill(os.getpid(), number)
        return stop

    with monkeypatch.context() as patch:
        patch.setattr(Console, "on_metrics", interrupting)
        stopped = run_in(folder, "train", "config.yaml")
    assert stopped.code == 128 + number
    assert "saved" in stopped.out

    ended = run_in(folder, "train", "config.yaml")
    assert ended.code == 0
    assert "resuming after step" in ended.out
    uninterrupted = json.loads((trained[0] / "run" / "results.json").read_text())
    assert json.loads((folder / "run" / "results.json").read_text()) == uninterrupted


def test_interrupt_before_the_first_step_prints_no_traceback(run_in, folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "run", interrupted)
    ran = run_in(folder, "train", "config.yaml")
    assert ran.code == 130
    assert ran.err.startswith("interrupted; the same command resumes from the last checkpoint")


def test_final_report_without_a_test_split_shows_dev_metrics(run_in, folder):
    ran = run_in(
        folder, "train", "config.yaml", "data.test=null", "data.input=null", "train.steps=1"
    )
    assert ran.code == 0
    assert "token loss (nats)" in ran.out
    assert "change" not in ran.out
    assert "╭" not in ran.out
    assert ran.out.endswith("  prefix-jax generate run/prefix\n")


@pytest.mark.parametrize("change", ["gone", "other fields", "empty"])
def test_shows_results_after_the_held_out_data_changed(run_in, folder, trained, change):
    shutil.copytree(trained[0] / "run", folder / "run")
    data = folder / "test.jsonl"
    data.unlink() if change == "gone" else data.write_text("" if change == "empty" else "{}\n")
    ran = run_in(folder, "train", "config.yaml")
    assert ran.code == 0, ran.err
    assert "token loss (nats)" in ran.out
    assert ran.out.endswith("  prefix-jax generate run/prefix\n")


def test_damaged_predictions_are_one_error(run_in, folder, trained):
    shutil.copytree(trained[0] / "run", folder / "run")
    (folder / "run" / "predictions.jsonl").write_text('{"prediction": 1}\n')
    ran = run_in(folder, "train", "config.yaml")
    assert ran.code == 2
    assert ran.err.startswith("error: run/results.json cannot be read (run/predictions.jsonl:1: ")


def test_rejects_a_locked_output(run_in, folder):
    lock = FileLock(folder / "run")
    lock.acquire()
    ran = run_in(folder, "train", "config.yaml")
    lock.release()
    assert ran.code == 2
    assert ran.err.startswith("error: run: another run is writing there (pid ")
    assert not (folder / "run").exists()


def test_second_process_is_rejected_and_the_first_continues(folder):
    def start() -> ForkedProcess:
        often = ("train.steps=1000000", "train.checkpoint_every=1000", "train.log_every=1000")
        return ForkedProcess(main, ["train", "config.yaml", *often], cwd=folder)

    first = start()
    # Printed before the first step.
    while "step" not in (line := first.stdout.readline()):
        assert line, first.stderr.read()
    second = start()
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


def test_printed_command_for_chats_starts_at_the_first_question(folder):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (folder / "chat.jsonl").write_text(json.dumps({"chat": turns}) + "\n")
    chat = f"data.test={folder / 'chat.jsonl'}"
    settings = ["data.input=null", "data.target=null", "data.messages=chat", chat]
    run = config.load(folder / "config.yaml", [*settings, f"output_dir={folder / 'run'}"])
    (folder / "run" / "prefix").mkdir(parents=True)
    words = shlex.split(command._command(folder / "run", make_task(run.data, run.task), run.data))
    assert json.loads(words[-1]) == {"chat": turns[:1]}


@pytest.mark.parametrize(
    ("called", "on_path", "typed"),
    [
        (".venv/bin/prefix-jax", None, ".venv/bin/prefix-jax"),
        ("/opt/bin/prefix-jax", "/opt/bin/prefix-jax", "prefix-jax"),
        ("/opt/bin/prefix-jax", "/usr/bin/prefix-jax", "/opt/bin/prefix-jax"),
        ("/usr/bin/pytest", None, "prefix-jax"),
    ],
)
def test_names_the_program_as_the_user_can_call_it(monkeypatch, called, on_path, typed):
    monkeypatch.setattr(command.sys, "argv", [called])
    monkeypatch.setattr(command.shutil, "which", lambda _: on_path)
    assert command._executable() == typed
