"""`run_tpu.sh` creates TPUs, trains, resumes, fetches and deletes."""

from __future__ import annotations

import re

import pytest
from fake_cloud import CONFIG, WHAT, WHERE, WHOLE, verb_of


def test_one_command_trains_fetches_and_deletes(cloud) -> None:
    cloud.states("absent", "CREATING", "READY")
    ended = cloud.run(*WHERE, *WHAT, "train.steps=5", "optim.learning_rate=1e-3")
    assert ended.returncode == 0, ended.stderr
    assert cloud.verbs == WHOLE
    create, *_ = (call for call in cloud.calls if verb_of(call) == "create")
    assert create == [
        *("compute", "tpus", "tpu-vm", "create", "prefix-jax", "--zone=us-west4-a", "--quiet"),
        *("--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"),
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
    ]
    start = next(call for call in cloud.calls if verb_of(call) == "start")
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
    create = next(call for call in cloud.calls if verb_of(call) == "create")
    assert create[2] == "queued-resources"
    assert {"--runtime-version=v2-alpha-tpuv5-lite", "--node-count=2", "--spot"} <= {*create}
    assert "--node-prefix=prefix-jax" in create
    assert all("--project=mine" in call for call in cloud.calls if call[0] == "compute")
    for call in cloud.calls:
        if verb_of(call) in ("scp", "install", "start", "outcome"):
            assert {"--worker=all", "--node=all"} <= {*call}
        if verb_of(call) == "logs":
            assert {"--worker=0", "--node=0"} <= {*call}
        if verb_of(call) == "delete":
            assert "--force" in call


def test_single_slice_may_be_queued(cloud) -> None:
    cloud.states("absent", "ACTIVE")
    ended = cloud.run("create", "--zone", "us-west4-a", "--accelerator", "v5litepod", "--queued",
                      "--reserved", "--topology", "4x4")  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    create = next(call for call in cloud.calls if verb_of(call) == "create")
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
