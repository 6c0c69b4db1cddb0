"""`run_tpu.sh`, with a fake `gcloud` that records its calls and returns prepared answers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = "configs/quickstart.yaml"
WHERE = ("--zone", "us-west4-a", "--accelerator", "v5litepod-16")
WHAT = ("--output-dir", "gs://bucket/run", CONFIG)
# `describe` and the workers return prepared answers in turn, and repeat the last one.
GCLOUD = r"""#!/usr/bin/env bash
here=$(dirname "$0")
printf '%s\x1f' "$@" >> "$here/calls"; printf '\x1e' >> "$here/calls"
next() {
    head -n 1 "$here/$1"
    [ "$(wc -l < "$here/$1")" -le 1 ] || sed -i 1d "$here/$1"
}
[ "$3" = queued-resources ] || [ "$3" = tpu-vm ] || exit 0
failures="$here/$4.fail"
if [ -f "$failures" ]; then
    left=$(cat "$failures")
    if [ "$left" -gt 0 ]; then
        echo $((left - 1)) > "$failures"; echo "ERROR: $4 failed" >&2; exit 255
    fi
fi
case "$4 $*" in
    describe*)
        now=$(next states)
        [ "$now" != absent ] || { echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1; }
        echo "$now" ;;
    ssh*outcome=*) next outcomes | tr ' ' '\n' ;;
esac
"""


class Cloud:
    """A fake Google Cloud that records its calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "gcloud").write_text(GCLOUD)
        (folder / "gcloud").chmod(0o755)
        self.states("absent", "READY")
        self.outcomes("outcome=0")

    def states(self, *states: str) -> None:
        """Sets the states that `describe` returns, in order."""
        (self.folder / "states").write_text("\n".join(states) + "\n")

    def outcomes(self, *outcomes: str) -> None:
        """Sets the outcomes that the workers report, in order."""
        (self.folder / "outcomes").write_text("\n".join(outcomes) + "\n")

    def fails(self, verb: str, times: int) -> None:
        """Makes a verb fail this many times before it works."""
        (self.folder / f"{verb}.fail").write_text(str(times))

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            [ROOT / "run_tpu.sh", *words],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path, "RUN_TPU_PAUSE": "0"},
            cwd=self.folder,
            timeout=60,
        )

    @property
    def calls(self) -> list[list[str]]:
        """The arguments of every call."""
        path = self.folder / "calls"
        text = path.read_text() if path.exists() else ""
        return [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]

    @property
    def verbs(self) -> list[str]:
        """The verb of every call except `describe`, with the purpose of each `ssh`."""
        return [verb for call in self.calls if (verb := _verb(call)) != "describe"]


def _verb(call: Sequence[str]) -> str:
    if call[0] == "storage":
        return call[1]
    if call[3] != "ssh":
        return call[3]
    text = call[-1]
    marks = {"uv pip": "install", "setsid": "start", "tail --lines=15": "outcome", "tail": "logs"}
    return next(name for mark, name in marks.items() if mark in text)


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path / "cloud")


WHOLE = ["create", "scp", "install", "start", "logs", "outcome", "rsync", "delete"]


def test_one_command_trains_fetches_and_deletes(cloud) -> None:
    cloud.states("absent", "CREATING", "READY")
    ended = cloud.run(*WHERE, *WHAT, "train.steps=5", "optim.learning_rate=1e-3")
    assert ended.returncode == 0, ended.stderr
    assert cloud.verbs == WHOLE
    create, *_ = (call for call in cloud.calls if _verb(call) == "create")
    assert create == [
        *("compute", "tpus", "tpu-vm", "create", "prefix-jax", "--zone=us-west4-a", "--quiet"),
        *("--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"),
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
    ]
    start = next(call for call in cloud.calls if _verb(call) == "start")
    assert "--worker=all" in start
    plain = start[-1].replace("\\", "")
    assert (
        f"prefix-jax train {CONFIG} --distributed output_dir=gs://bucket/run train.steps=5 "
        "optim.learning_rate=1e-3" in plain
    )
    fetched = next(call for call in cloud.calls if call[0] == "storage")
    assert fetched[-2:] == ["gs://bucket/run", "runs/prefix-jax"]


def test_several_slices_are_one_queued_resource(cloud) -> None:
    cloud.states("absent", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    ended = cloud.run(*WHERE, *WHAT, "--slices", "2", "--spot", "--project", "mine")
    assert ended.returncode == 0, ended.stderr
    create = next(call for call in cloud.calls if _verb(call) == "create")
    assert create[2] == "queued-resources"
    assert {"--runtime-version=v2-alpha-tpuv5-lite", "--node-count=2", "--spot"} <= {*create}
    assert "--node-prefix=prefix-jax" in create
    assert all("--project=mine" in call for call in cloud.calls if call[0] == "compute")
    for call in cloud.calls:
        if _verb(call) in ("scp", "install", "start", "outcome"):
            assert {"--worker=all", "--node=all"} <= {*call}
        if _verb(call) == "logs":
            assert {"--worker=0", "--node=0"} <= {*call}
        if _verb(call) == "delete":
            assert "--force" in call


def test_single_slice_may_be_queued(cloud) -> None:
    cloud.states("absent", "ACTIVE")
    ended = cloud.run("create", "--zone", "us-west4-a", "--accelerator", "v5litepod", "--queued",
                      "--reserved", "--topology", "4x4")  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    create = next(call for call in cloud.calls if _verb(call) == "create")
    assert {"--node-id=prefix-jax", "--reserved", "--type=v5litepod", "--topology=4x4"} <= {*create}


@pytest.mark.parametrize(
    ("accelerator", "version"),
    [
        ("v5litepod-4", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_software_version_matches_the_accelerator(cloud, accelerator: str, version: str) -> None:
    ended = cloud.run("create", "--dry-run", "--zone", "z", "--accelerator", accelerator)
    assert f"--version={version}" in ended.stderr


def test_uses_an_existing_tpu(cloud) -> None:
    cloud.states("READY")
    assert cloud.run("create", *WHERE).returncode == 0
    assert cloud.verbs == []


def test_preempted_tpu_is_created_again_and_training_resumes(cloud) -> None:
    cloud.states("absent", "READY", "PREEMPTED", "PREEMPTED", "PREEMPTED", "absent", "READY")
    cloud.outcomes("outcome=0 outcome=134", "outcome=0 outcome=0")
    ended = cloud.run("--spot", *WHERE, *WHAT)
    assert ended.returncode == 0, ended.stderr
    assert cloud.verbs == [*WHOLE[:6], "delete", *WHOLE]
    assert "was preempted" in ended.stderr


def test_suspended_slice_is_created_again(cloud) -> None:
    cloud.states(*("absent", "ACTIVE"), *["SUSPENDED"] * 3, *("absent", "ACTIVE"))
    cloud.outcomes("outcome=134", "outcome=0")
    ended = cloud.run("--queued", *WHERE, *WHAT)
    assert ended.returncode == 0, ended.stderr
    assert cloud.verbs == [*WHOLE[:6], "delete", *WHOLE]


@pytest.mark.parametrize("outcomes", ["outcome=none outcome=134", "outcome=143 outcome=143"])
def test_training_resumes_after_a_worker_restarts(cloud, outcomes: str) -> None:
    cloud.outcomes(outcomes, "outcome=0 outcome=0")
    ended = cloud.run(*WHERE, *WHAT)
    assert ended.returncode == 0, ended.stderr
    assert cloud.verbs == [*WHOLE[:6], *WHOLE[1:]]


def test_limits_the_number_of_restarts(cloud) -> None:
    cloud.outcomes("outcome=none")
    ended = cloud.run(*WHERE, *WHAT, "--restarts", "2")
    assert ended.returncode == 1
    assert cloud.verbs.count("start") == 3
    assert "2 times" in ended.stderr


def test_follows_the_log_again_after_a_broken_connection(cloud) -> None:
    cloud.outcomes("outcome=running outcome=running", "outcome=0 outcome=0")
    ended = cloud.run(*WHERE, *WHAT)
    assert ended.returncode == 0, ended.stderr
    assert cloud.verbs.count("start") == 1
    assert cloud.verbs.count("logs") == 2


def test_failed_training_shows_its_log_and_keeps_the_tpu(cloud) -> None:
    cloud.outcomes("error:_no_such_file outcome=2")
    ended = cloud.run(*WHERE, *WHAT)
    assert ended.returncode == 1
    assert "error:_no_such_file" in ended.stderr
    assert "./run_tpu.sh delete" in ended.stderr
    assert "delete" not in cloud.verbs
    assert "rsync" not in cloud.verbs


@pytest.mark.parametrize("logged", ["running", "none", "143", "0"])
def test_log_lines_are_never_mistaken_for_outcomes(cloud, logged) -> None:
    cloud.outcomes(f"|_labels:_outcome={logged} |outcome={logged} outcome=2")
    ended = cloud.run(*WHERE, *WHAT)
    assert ended.returncode == 1
    assert "training failed" in ended.stderr
    assert cloud.verbs.count("start") == 1
    assert cloud.verbs.count("outcome") == 1


@pytest.mark.parametrize("code", ["1430", "1", "139"])
def test_matches_whole_exit_codes(cloud, code) -> None:
    cloud.outcomes(f"outcome={code} outcome=0")
    assert "training failed" in cloud.run(*WHERE, *WHAT).stderr


def test_retries_ssh_while_a_tpu_starts(cloud) -> None:
    cloud.fails("scp", 3)
    assert cloud.run(*WHERE, *WHAT).returncode == 0


def test_unreachable_ssh_suggests_causes(cloud) -> None:
    cloud.fails("scp", 99)
    ended = cloud.run(*WHERE, *WHAT)
    assert ended.returncode == 1
    assert cloud.verbs.count("scp") == 5
    assert "firewall" in ended.stderr


def test_rejected_tpu_suggests_alternatives(cloud) -> None:
    cloud.fails("create", 1)
    ended = cloud.run(*WHERE, *WHAT)
    assert ended.returncode == 1
    assert "ERROR: create failed" in ended.stderr  # gcloud's own words
    assert "--queued" in ended.stderr


def test_failed_request_says_how_to_find_the_reason(cloud) -> None:
    cloud.states("absent", "WAITING_FOR_RESOURCES", "FAILED")
    ended = cloud.run(*WHERE, *WHAT, "--queued")
    assert ended.returncode == 1
    assert "queued-resources describe prefix-jax --zone=us-west4-a" in ended.stderr


def test_earlier_failed_request_is_repeated(cloud) -> None:
    cloud.states("FAILED", "FAILED", "absent", "ACTIVE")
    ended = cloud.run("create", *WHERE, "--queued")
    assert ended.returncode == 0, ended.stderr
    assert cloud.verbs == ["delete", "create"]


def test_missing_permission_is_not_a_missing_tpu(cloud) -> None:
    cloud.fails("describe", 99)
    ended = cloud.run(*WHERE, *WHAT)
    assert ended.returncode == 1
    assert "gcloud auth login" in ended.stderr
    assert cloud.verbs == []


def test_delete_accepts_a_missing_tpu(cloud) -> None:
    cloud.states("absent")
    assert cloud.run("delete", "--zone", "us-west4-a").returncode == 0
    assert cloud.verbs == []


def test_status_shows_every_worker(cloud) -> None:
    cloud.states("READY")
    cloud.outcomes("outcome=running outcome=none")
    ended = cloud.run("status", "--zone", "us-west4-a")
    assert ended.stdout.split() == [
        "prefix-jax:",
        "READY".lower(),
        "outcome=running",
        "outcome=none",
    ]


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


def test_keep_does_not_delete_the_tpu(cloud) -> None:
    ended = cloud.run(*WHERE, *WHAT, "--keep")
    assert cloud.verbs == WHOLE[:-1]
    assert "delete --zone us-west4-a" in ended.stderr


def test_prints_the_full_command_that_deletes_a_kept_tpu(cloud) -> None:
    where = (*WHERE, "--project", "mine", "--name", "two")
    ended = cloud.run(*where, "--slices", "2", *WHAT, "--keep")
    shown = re.search(r"\./run_tpu\.sh (delete .*)", ended.stderr)
    assert shown is not None
    cloud.states("ACTIVE")
    before = len(cloud.calls)
    assert cloud.run(*shown[1].split()).returncode == 0
    call = cloud.calls[-1]
    assert len(cloud.calls) > before
    assert call[2:5] == ["queued-resources", "delete", "two"]
    assert "--project=mine" in call


STEPS = ("all", "create", "install", "train", "logs", "status", "fetch", "delete")


@pytest.mark.parametrize("step", STEPS)
def test_dry_run_prints_every_command_and_runs_none(cloud, step: str) -> None:
    dry = cloud.run("--dry-run", step, *WHERE, *WHAT)
    assert dry.returncode == 0, dry.stderr
    assert cloud.calls == []
    # Other messages are marked too.
    messages = [line for line in dry.stderr.splitlines() if line.startswith("run_tpu")]
    assert all(line.startswith("run_tpu (dry run): ") for line in messages)
    if step not in ("all", "create"):
        cloud.states("READY")
    assert cloud.run(step, *WHERE, *WHAT).returncode == 0
    shown = re.findall(r"^\+ (?:gcloud compute tpus tpu-vm|gcloud storage) (\w+)", dry.stderr, re.M)
    asked = [call[1] if call[0] == "storage" else call[3] for call in cloud.calls]
    assert [verb for verb in shown if verb != "describe"] == [
        verb for verb in asked if verb != "describe"
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (WHERE, "--output-dir gs://BUCKET/RUN CONFIG"),
        ((*WHERE, "--output-dir", "runs/x", CONFIG), "gcloud storage buckets create"),
        ((*WHERE, *WHAT, "second.yaml"), "expected one config, got"),
        (
            (*WHERE, "--output-dir", "gs://b/r", "configs/none.yaml"),
            "no config configs/none.yaml",
        ),
        ((*WHERE, *WHAT, "--slices", "0"), "--slices must be a positive integer, got 0"),
        ((*WHERE, "--output-dir", "gs://", CONFIG), "got gs:// without a folder"),
        ((*WHERE, "--output-dir", "gs://bucket/", CONFIG), "gs://BUCKET/RUN"),
        ((*WHERE, *WHAT, "--spot=yes"), "--spot does not accept a value"),
        ((*WHERE, *WHAT, "--dry-run=yes"), "--dry-run does not accept a value"),
        (("--zone", "z", "--accelerator", "v5e-8", *WHAT), "--accelerator v5litepod-8"),
        ((*WHERE, *WHAT, "--sport"), "unknown option --sport"),
        ((*WHERE, *WHAT, "--name"), "--name needs a value"),
        ((*WHERE, *WHAT, "--env", "missing"), "no file missing"),
        (("--zone", "z", "--accelerator", "tpu7x-8", *WHAT), "Kubernetes"),
        (("--zone", "z", "--accelerator", "h100", *WHAT), "--version"),
        ((*WHAT,), "--zone ZONE --accelerator TYPE"),
        (("creat", "--zone", "z"), "creat is not a step or a config file"),
        (("create", "delete", *WHERE), "expected one step, got create and delete"),
        ((*WHERE, *WHAT, "output_dir=runs/x"), "--output-dir"),
        ((*WHERE, *WHAT, "--name", "../My TPU"), "got ../My TPU"),
        (("--zone", "z", "--accelerator", "v5p", *WHAT), "--accelerator v5p has no size"),
        ((*WHERE, *WHAT, "--topology", "4x4"), "--topology needs a type without its size"),
    ],
)
def test_reports_mistakes_before_the_first_command(cloud, words, message: str) -> None:
    ended = cloud.run(*words)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert cloud.calls == []


@pytest.mark.parametrize(
    "words",
    [
        ("--dry-run", "--zone=us-west4-a", "--accelerator=v5litepod-16", *WHAT),
        ("--dry-run", *WHERE, "--output-dir", "gs://bucket/run", str(ROOT / CONFIG)),
    ],
)
def test_accepts_other_spellings_of_options_and_paths(cloud, words: tuple[str, ...]) -> None:
    other = re.sub(r"/tmp\.\w+", "", cloud.run(*words).stderr)
    assert other == re.sub(r"/tmp\.\w+", "", cloud.run("--dry-run", *WHERE, *WHAT).stderr)


def test_step_may_follow_the_options(cloud) -> None:
    assert cloud.run("--dry-run", "--zone", "z", "delete").stderr.count("\n") == 1


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
            if (verb := _verb(call)) in ("start", "logs", "outcome")
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
    told = worker.run("outcome").splitlines()
    assert [line for line in told if line.startswith("outcome=")] == ["outcome=2"]
    assert told[1:] == [
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


def test_help_names_every_option(cloud) -> None:
    text = cloud.run("--help").stdout
    script = (ROOT / "run_tpu.sh").read_text()
    parser = script.partition("parse() {")[2].partition("# Checks all arguments")[0]
    options = set(re.findall(r"--[a-z-]+", parser))
    assert options - {"--help"} <= set(re.findall(r"--[a-z-]+", text))


def test_missing_gcloud_says_where_to_get_it(tmp_path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "env"):
        (tools / name).symlink_to(str(shutil.which(name)))
    ended = subprocess.run(
        [ROOT / "run_tpu.sh", *WHERE, *WHAT],
        capture_output=True,
        text=True,
        env={"PATH": str(tools)},
    )
    assert ended.returncode == 1
    assert "cloud.google.com/sdk/docs/install" in ended.stderr
