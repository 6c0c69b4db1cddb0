"""The command line of `run_tpu.sh`."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from fake_cloud import CONFIG, ROOT, WHAT, WHERE

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
