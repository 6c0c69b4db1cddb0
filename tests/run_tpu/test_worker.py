"""The commands of `run_tpu.sh` on a worker, and the environment that it receives."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fake_cloud import CONFIG, WHAT, WHERE, Cloud, verb_of


class Worker:
    """A worker of the TPU that runs the commands that a cloud received."""

    def __init__(self, cloud: Cloud, home: Path, program: str, env: str | None = None) -> None:
        self.home = home
        path = home / "prefix_jax" / ".venv" / "bin" / "prefix-jax"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{program}\n")
        path.chmod(0o755)
        if env is not None:
            (home / "prefix_jax" / "env").write_text(env)
        self.commands = {
            verb: call[-1].removeprefix("--command=")
            for call in cloud.calls
            if (verb := verb_of(call)) in ("start", "logs", "outcome")
        }

    def run(self, verb: str) -> str:
        return subprocess.run(
            ["bash", "-c", self.commands[verb]],
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=20,
        ).stdout

    def train(self) -> str:
        """Trains to the end; returns the log."""
        self.run("start")
        log = self.run("logs")
        # The lock is released shortly after the program ends.
        subprocess.run(["flock", self.home / "prefix_jax" / "run.lock", "true"], timeout=20)
        return log


def test_secrets_are_copied_as_a_file_and_never_part_of_a_command(cloud, tmp_path) -> None:
    secret = tmp_path / "env"
    secret.write_text("HF_TOKEN=hf_secret\n")
    ended = cloud.run(*WHERE, *WHAT, "--env", str(secret))
    assert ended.returncode == 0, ended.stderr
    assert any(
        call[5] == "prefix-jax:prefix_jax/env" for call in cloud.calls if call[3:4] == ["scp"]
    )
    assert "hf_secret" not in ended.stderr + str(cloud.calls)


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("TOKEN", 1, "expected NAME=VALUE"),
        ("A=1\n\n# fine\nexport B=2\n", 4, "expected NAME=VALUE"),
        ("A=1\n B=2\n", 2, "expected NAME=VALUE"),
        ("A =1\n", 1, "expected NAME=VALUE"),
        ("=1\n", 1, "expected NAME=VALUE"),
        ("1A=1\n", 1, "expected NAME=VALUE"),
        ("A-B=1\n", 1, "expected NAME=VALUE"),
        ("touch x; A=1\n", 1, "expected NAME=VALUE"),
        ("A=1\nrm -r x", 2, "expected NAME=VALUE"),
        ("A=1\r\n", 1, "Unix line endings"),
        ("A=1\0\n", 1, "carriage return"),
        ("UID=0\n", 1, "UID cannot be set"),
    ],
)
def test_rejects_malformed_env_lines_before_the_first_command(
    cloud, tmp_path, content, line, message
) -> None:
    env = tmp_path / "env"
    env.write_text(content)
    ended = cloud.run(*WHERE, *WHAT, "--env", str(env))
    assert ended.returncode == 2
    assert f"{env}:{line}: " in ended.stderr
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert cloud.calls == []


def test_env_values_arrive_unchanged(cloud, tmp_path) -> None:
    values = {
        "TOKEN": "a b",
        "QUOTE": "a'b\"c",
        "DOLLAR": "a$b${HOME}",
        "COMMAND": "$(touch ran)`touch ran`;touch ran & x|y>ran",
        "HASH": "#a=b # c",
        "BACKSLASH": "a\\nb\\",
        "EMPTY": "",
        "BLANKS": "  a\t ",
        "STARS": "* ~ ?",
        "_LAST": "é",
    }
    lines = "".join(f"{name}={value}\n" for name, value in values.items()).rstrip("\n")
    content = f"# a comment\n\n  \t\n  # another\n{lines}"
    env = tmp_path / "env"
    env.write_text(content)
    ended = cloud.run(*WHERE, *WHAT, "--env", str(env))
    assert ended.returncode == 0, ended.stderr
    worker = Worker(cloud, tmp_path / "home", "exec env -0", content)
    received = dict(line.partition("=")[::2] for line in worker.train().split("\0"))
    assert {name: received.get(name) for name in values} == values
    assert not list(worker.home.rglob("ran"))


@pytest.mark.parametrize("ending", ["\\n", ""])
def test_worker_prefixes_its_log_lines(cloud, tmp_path, ending) -> None:
    cloud.run(*WHERE, *WHAT)
    printed = f"outcome=running\\nlabels: outcome=none\\noutcome=0{ending}"
    worker = Worker(cloud, tmp_path / "home", f"printf '{printed}'; exit 2")
    worker.train()
    reported = worker.run("outcome").splitlines()
    assert [line for line in reported if line.startswith("outcome=")] == ["outcome=2"]
    assert reported[1:] == [
        "| outcome=running",
        "| labels: outcome=none",
        "| outcome=0",
        "outcome=2",
    ]


@pytest.mark.parametrize("code", [0, 3])
def test_worker_trains_once_and_reports_the_outcome(cloud, tmp_path, code: int) -> None:
    cloud.run(*WHERE, *WHAT, "data.input={facts} and 'quotes'")
    program = f'echo "got $*, $TOKEN"\nexit {code}'
    worker = Worker(cloud, tmp_path / "home", program, "TOKEN=secret\n")
    assert worker.run("outcome") == "outcome=none\n"
    log = worker.train()
    settings = "output_dir=gs://bucket/run data.input={facts} and 'quotes'"
    line = f"got train {CONFIG} --distributed {settings}, secret"
    assert log == f"{line}\n"
    outcome = worker.run("outcome")
    assert outcome.splitlines()[-1] == f"outcome={code}"
    assert (line in outcome) == (code != 0)
