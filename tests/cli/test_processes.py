"""Runs of two processes, as on two hosts."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from pathlib import Path

import jax
import pytest
import tiny_runs
from forked import ForkedProcess
from run_processes import run_host

from prefix_jax import config
from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.cli.main import main
from prefix_jax.mesh import make_mesh
from prefix_jax.runs.run import run

CONFIG = """
model: {path: MODEL}
method: {name: prefix, length: 4, dropout: 0.2}
data: {train: HERE/train.jsonl, dev: HERE/some.jsonl, test: HERE/some.jsonl, batch_size: 4,
       input: "{sum}=", target: "{total}"}
optim: {grad_accum_steps: 2}
train: {steps: 12, checkpoint_every: 3}
evaluate: {metrics: [loss, accuracy, exact_match], labels: ["02", "03"], batch_size: 4}
decode: {max_new_tokens: 4}
"""
# Well above the duration of a run, so that only a process that waits for a dead one fails.
TIMEOUT_SECONDS = 240


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    text = CONFIG.replace("MODEL", str(tiny_model_dir)).replace("HERE", str(folder))
    (folder / "config.yaml").write_text(text)
    for name, records in (("train", tiny_runs.RECORDS), ("some", tiny_runs.SOME)):
        lines = (json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An uninterrupted run of two processes; one batch of the second process is slow."""
    ended = pair(folder, "whole", step=9)
    assert [code for code, _ in ended] == [0, 0], ended
    (folder / "whole.log").write_text(ended[0][1])
    return folder / "whole"


def pair(
    folder: Path, output: str, number: signal.Signals | None = None, step: int = 0
) -> list[tuple[int, str]]:
    """Runs two processes; returns the exit code and the output of each.

    Args:
        folder: the folder of the config.
        output: the run directory.
        number: a signal for the second process, or None.
        step: the step at which the second process receives the signal, or is slow if there is
            no signal. 0 means never.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for index in range(2):
        words = [f"output_dir={output}", "--distributed", f"--process={index}"]
        kill = (int(number or 0), step) if index == 1 else (0, 0)
        environment = {
            "XLA_FLAGS": "",
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
        }
        command = ["train", "config.yaml", *words]
        processes.append(ForkedProcess(run_host, *kill, command, env=environment, cwd=folder))
    try:
        printed = ["".join(process.communicate(TIMEOUT_SECONDS)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


def run_single(folder: Path, output: Path) -> None:
    """Runs the same config in one process with two devices."""
    settings = config.load(folder / "config.yaml", [f"output_dir={output}"])
    mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])
    run(settings, pretrained=load(settings.model.path, mesh=mesh), quiet=True)


def test_two_processes_equal_one(folder: Path, whole: Path, tmp_path: Path) -> None:
    run_single(folder, tmp_path)
    assert tiny_runs.outcome(tmp_path) == tiny_runs.outcome(whole)


def test_names_the_slowest_host(folder: Path, whole: Path) -> None:
    log = " ".join((folder / "whole.log").read_text().split())
    assert f"times as long as usual: process 1 of 2 on host {socket.gethostname()} needed" in log


def test_interrupted_and_killed_runs_end_bit_identical(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    # One process receives the signal; both stop after the same step.
    ended = pair(folder, "hard", signal.SIGTERM, step=4)
    assert [code for code, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    assert "interrupted after step 5, which is saved" in ended[0][1]
    # Only the first process prints.
    assert "step" not in ended[1][1]

    (first, text), (second, _) = pair(folder, "hard", signal.SIGKILL, step=3)
    assert second == -signal.SIGKILL
    assert first not in (0, 128 + signal.SIGTERM), text
    assert "error: this process cannot continue" in text
    assert not (folder / "hard" / "prefix").exists()

    # One process can resume the run of two.
    shutil.copytree(folder / "hard", tmp_path / "moved")
    run_single(folder, tmp_path / "moved")
    assert tiny_runs.outcome(tmp_path / "moved") == tiny_runs.outcome(whole)

    assert [code for code, _ in pair(folder, "hard")] == [0, 0]
    assert tiny_runs.outcome(folder / "hard") == tiny_runs.outcome(whole)


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["--processes", "2"], {}, "need --coordinator HOST:PORT"),
        ([], {"JAX_NUM_PROCESSES": "2"}, "(or JAX_COORDINATOR_ADDRESS)"),
        ([], {"JAX_PROCESS_ID": "1"}, "(or JAX_COORDINATOR_ADDRESS)"),
        (["--coordinator", "localhost"], {}, "must be HOST:PORT"),
        (["--coordinator", ":1234"], {}, "must be HOST:PORT"),
        (["--coordinator", "h:99999"], {}, "must be HOST:PORT"),
        ([], {"JAX_COORDINATOR_ADDRESS": "h:port"}, "must be HOST:PORT"),
        (["--coordinator", "h:1", "--processes", "0", "--process", "0"], {}, "must be at least 1"),
        (["--distributed"], {}, "--coordinator HOST:PORT --processes N --process I"),
        (
            ["--distributed"],
            {"JAX_NUM_PROCESSES": "two"},
            "JAX_NUM_PROCESSES must be a number, got 'two'",
        ),
        (
            ["--coordinator", "h:1", "--processes", "2", "--process", "2"],
            {},
            "--process must be between 0 and 1 (--processes 2), got 2",
        ),
    ],
)
def test_reports_missing_or_invalid_process_options(
    words, environment, message, monkeypatch, capsys
) -> None:
    def initialize(*_, **__) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "config.yaml", *words]) == 2
    assert message in capsys.readouterr().err


def test_reports_a_port_in_use_before_jax_crashes(capsys) -> None:
    with socket.create_server(("", 0)) as taken:
        where = f"localhost:{taken.getsockname()[1]}"
        words = ["--coordinator", where, "--processes", "2", "--process", "0"]
        assert main(["train", "config.yaml", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --coordinator {where}: cannot listen on port")
    assert "choose a free port" in line
