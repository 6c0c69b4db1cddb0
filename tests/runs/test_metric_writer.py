"""Metrics on disk survive kills, and read after a resume as if the run had never stopped."""

import json
import math
import os
import signal
import struct
import subprocess
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from prefix_jax.errors import CheckpointError
from prefix_jax.runs.metric_writer import MetricWriter, read_metrics


def write(directory, start, end):
    record = MetricWriter(directory, start)
    for step in range(start + 1, end + 1):
        record.write(step, "train", {"loss": float(step)})
    record.close()


def events(directory):
    """Returns all events, in the order in which TensorBoard reads the files."""
    events = []
    for path in sorted((directory / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def test_writes_each_step_and_evaluation_as_line_and_event(tmp_path):
    record = MetricWriter(tmp_path / "new" / "run", 0)
    record.write(0, "dev", {"loss": 2.0})
    record.write(1, "train", {"loss": 1.5, "tokens": 64})
    record.close()
    lines = read_metrics(tmp_path / "new" / "run")
    assert [{**line, "time": None} for line in lines] == [
        {"step": 0, "kind": "dev", "loss": 2.0, "time": None},
        {"step": 1, "kind": "train", "loss": 1.5, "tokens": 64.0, "time": None},
    ]
    values = [
        (event.step, value.tag, value.simple_value)
        for event in events(tmp_path / "new" / "run")
        for value in event.summary.value
    ]
    assert values == [(0, "dev/loss", 2.0), (1, "train/loss", 1.5), (1, "train/tokens", 64.0)]


def test_nonfinite_values_become_null(tmp_path):
    record = MetricWriter(tmp_path, 0)
    record.write(1, "train", {"loss": math.nan, "grad_norm": math.inf})
    record.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["loss"] is None
    assert line["grad_norm"] is None


def test_resume_drops_later_lines(tmp_path):
    write(tmp_path, 0, 7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "ki')
    write(tmp_path, 5, 9)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 10))
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [0, 6]


def test_resume_keeps_an_evaluation_at_its_step(tmp_path):
    record = MetricWriter(tmp_path, 0)
    record.write(5, "train", {"loss": 1.0})
    record.write(5, "dev", {"loss": 1.0})
    record.write(6, "train", {"loss": 1.0})
    record.close()
    MetricWriter(tmp_path, 5).close()
    assert [line["kind"] for line in read_metrics(tmp_path)] == ["train", "dev"]


def test_run_from_step_0_overwrites_the_file(tmp_path):
    record = MetricWriter(tmp_path, 0)
    record.write(0, "dev", {"loss": 2.0})
    record.close()
    write(tmp_path, 0, 1)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_ignores_an_incomplete_line(tmp_path):
    write(tmp_path, 0, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_kill_loses_at_most_the_last_line(tmp_path):
    script = (
        "import pathlib, sys\n"
        "from prefix_jax.runs.metric_writer import MetricWriter\n"
        "record = MetricWriter(pathlib.Path(sys.argv[1]), 0)\n"
        "for step in range(1, 10**9):\n"
        "    record.write(step, 'train', {'loss': 1.0})\n"
        "    print(step, flush=True)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(50):
            written = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    assert written == 50
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps[:50] == list(range(1, 51))
    MetricWriter(tmp_path, 50).close()
    assert len(read_metrics(tmp_path)) == 50
    assert max(event.step for event in events(tmp_path)[:-2]) >= 50


@pytest.mark.parametrize("line", ["not JSON", "[]", '{"loss": 1.0}', "\udcff"])
def test_names_a_malformed_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, 0, 1)
    path.write_bytes(path.read_bytes() + os.fsencode(line) + b"\n")
    for use in (lambda: MetricWriter(tmp_path, 5), lambda: read_metrics(tmp_path)):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2 is not a line of metrics"):
            use()


def test_names_a_file_in_place_of_a_directory(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*tensorboard"):
        MetricWriter(tmp_path, 0)


def test_names_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*metrics\.jsonl"):
        read_metrics(tmp_path)


def test_full_disk_is_an_error_that_names_the_file(tmp_path):
    script = (
        "import pathlib, resource, sys\n"
        "from prefix_jax.errors import CheckpointError\n"
        "from prefix_jax.runs.metric_writer import MetricWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "record = MetricWriter(pathlib.Path(sys.argv[1]), 0)\n"
        "try:\n"
        "    for step in range(1, 100):\n"
        "        record.write(step, 'train', {'loss': 1.0})\n"
        "except CheckpointError as error:\n"
        "    print(step, error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    step, message = done.stdout.split(" ", 1)
    assert f"cannot write {tmp_path}" in message
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, int(step)))
