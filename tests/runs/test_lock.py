"""Locks of run directories: who acquires them, which are stale, and how others are refused.

One test runs this file as a script in another process.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import buckets
import psutil
import pytest

from prefix_jax.errors import CheckpointError, ConfigError
from prefix_jax.runs import lock as locks
from prefix_jax.runs.lock import LOCK, SILENCE, BucketLock, FileLock, Owner

GONE = 2**22 + 1  # larger than any process id


@pytest.fixture
def owner() -> Owner:
    return Owner.of_this_process()


def write_lock(directory: Path, owner: Owner) -> Path:
    """Writes the lock of an owner that no longer holds it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / LOCK).write_bytes(locks._write(owner))
    return directory / LOCK


def acquired(directory: Path) -> bool:
    lock = FileLock(directory)
    lock.acquire()
    lock.release()
    return True


# --- On a disk -------------------------------------------------------------------------------


def test_refuses_a_second_lock_until_the_first_is_released(tmp_path: Path) -> None:
    first = FileLock(tmp_path / "run")
    first.acquire()
    before = (tmp_path / "run" / LOCK).read_bytes()
    with pytest.raises(ConfigError, match=rf"another run is writing there \(pid {os.getpid()} on"):
        FileLock(tmp_path / "run").acquire()
    assert (tmp_path / "run" / LOCK).read_bytes() == before
    first.release()
    assert not (tmp_path / "run").exists()
    assert acquired(tmp_path / "run")


def test_release_keeps_a_directory_with_files(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "a" / "run")
    lock.acquire()
    (tmp_path / "a" / "run" / "config.yaml").write_text("")
    lock.release()
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == ["config.yaml"]


def test_lock_of_a_killed_process_is_stale(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(ConfigError, match=rf"another run is writing there \(pid {process.pid} on"):
        FileLock(tmp_path).acquire()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / LOCK).exists()
    assert acquired(tmp_path)


def hold(directory: Path) -> None:
    """The process of the test above."""
    FileLock(directory).acquire()
    print("locked", flush=True)
    time.sleep(600)


def test_unheld_lock_on_a_local_disk_is_stale_whatever_its_content(
    tmp_path: Path, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_is_local", lambda _: True)
    write_lock(tmp_path, dataclasses.replace(owner, host="a-container-that-was-restarted"))
    assert acquired(tmp_path)
    for content in (b"", b"{", b"[" * 4000, b"\xff", b'{"host": 1, "pid": "x"}', b"[]"):
        (tmp_path / LOCK).write_bytes(content)
        assert acquired(tmp_path)


def unsupported(*_: object, **__: object) -> None:
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize("flock", [fcntl.flock, unsupported])
def test_named_process_decides_on_a_shared_disk(
    tmp_path: Path, owner: Owner, monkeypatch: pytest.MonkeyPatch, flock
) -> None:
    monkeypatch.setattr(locks, "_is_local", lambda _: False)
    monkeypatch.setattr(fcntl, "flock", flock)
    write_lock(tmp_path / "killed", dataclasses.replace(owner, pid=GONE))
    assert acquired(tmp_path / "killed")
    write_lock(tmp_path / "pid reused", dataclasses.replace(owner, started="another boot:1"))
    assert acquired(tmp_path / "pid reused")
    write_lock(tmp_path / "running", owner)
    with pytest.raises(ConfigError, match="another run is writing there"):
        FileLock(tmp_path / "running").acquire()
    file = write_lock(tmp_path / "elsewhere", dataclasses.replace(owner, host="other", pid=GONE))
    with pytest.raises(ConfigError) as raised:
        FileLock(tmp_path / "elsewhere").acquire()
    message = str(raised.value)
    assert f"pid {GONE} on other, since {owner.since}" in message
    assert f"If it has, remove {file} and start again" in message


def test_refuses_a_second_lock_without_flock(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fcntl, "flock", unsupported)
    first = FileLock(tmp_path / "run")
    first.acquire()
    with pytest.raises(ConfigError, match="another run is writing there"):
        FileLock(tmp_path / "run").acquire()
    first.release()
    assert acquired(tmp_path / "run")


def test_unwritable_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file/run: Not a directory"):
        FileLock(tmp_path / "file" / "run").acquire()
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(CheckpointError, match="cannot write to"):
        FileLock(tmp_path).acquire()
    assert not (tmp_path / "precious").exists()


def test_innermost_mount_determines_the_file_system(monkeypatch) -> None:
    def mount(point: str, kind: str) -> SimpleNamespace:
        return SimpleNamespace(mountpoint=point, fstype=kind)

    mounts = [mount("/", "ext4"), mount("/data", "nfs4"), mount("/data/fast", "xfs")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    assert locks._is_local(Path("/home/run"))
    assert not locks._is_local(Path("/data/run"))
    assert locks._is_local(Path("/data/fast/run"))


# --- In a bucket -----------------------------------------------------------------------------

RUN = "gs://bucket/run"


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> buckets.FakeBackend:
    return buckets.install(tmp_path / "cloud", monkeypatch)


@pytest.fixture
def remote(cloud, tmp_path: Path) -> Path:
    (tmp_path / "cloud/bucket/run").mkdir(parents=True)
    return tmp_path / "cloud/bucket/run"


class Clock:
    """Counts seconds of sleep, and calls a function after some of them."""

    def __init__(self, call=None, after: float = 0.0) -> None:
        self.waited, self._call, self._after = 0.0, call, after

    def __call__(self, seconds: float) -> None:
        self.waited += seconds
        if self._call is not None and self.waited >= self._after:
            self._call()
            self._call = None


def test_owner_of_a_bucket_lock_excludes_a_second_run(remote: Path) -> None:
    first = BucketLock(RUN, pytest.fail)
    first.acquire()
    assert json.loads((remote / LOCK).read_text())["pid"] == os.getpid()
    messages: list[str] = []
    clock = Clock(first.beat, after=15)
    with pytest.raises(ConfigError, match=rf"another run is writing there \(pid {os.getpid()} on"):
        BucketLock(RUN, messages.append, clock).acquire()
    assert clock.waited < SILENCE / 2
    assert "waiting 120 s for a heartbeat" in messages[0]
    first.check()
    first.release()
    assert not (remote / LOCK).exists()


def test_bucket_lock_of_a_killed_process_of_this_host_is_stale_at_once(
    remote: Path, owner: Owner
) -> None:
    write_lock(remote, dataclasses.replace(owner, pid=GONE))
    lock = BucketLock(RUN, pytest.fail, pytest.fail)
    lock.acquire()
    lock.release()


def test_takes_over_a_silent_lock_of_another_host(remote: Path, owner: Owner) -> None:
    write_lock(remote, dataclasses.replace(owner, host="preempted"))
    clock = Clock()
    lock = BucketLock(RUN, lambda _: None, clock)
    lock.acquire()
    assert clock.waited == SILENCE
    assert json.loads((remote / LOCK).read_text())["host"] == owner.host
    lock.release()


def test_owner_stops_after_its_lock_was_taken_over(remote: Path, owner: Owner) -> None:
    lock = BucketLock(RUN, pytest.fail)
    lock.acquire()
    write_lock(remote, dataclasses.replace(owner, host="other", token="other"))
    lock.beat()
    with pytest.raises(CheckpointError, match=r"another run took the lock over \(pid .* on other"):
        lock.check()
    lock.release()
    assert json.loads((remote / LOCK).read_text())["host"] == "other"


def test_owner_stops_after_its_lock_was_removed(remote: Path) -> None:
    lock = BucketLock(RUN, pytest.fail)
    lock.acquire()
    (remote / LOCK).unlink()
    lock.beat()
    with pytest.raises(CheckpointError, match="was removed; this run stops"):
        lock.check()
    lock.release()


def test_unreachable_bucket_does_not_lose_the_lock(remote: Path, cloud, monkeypatch) -> None:
    lock = BucketLock(RUN, pytest.fail)
    lock.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(buckets.FakeBackend, "cat_file", unsupported)
        lock.beat()
    lock.check()
    lock.beat()
    assert json.loads((remote / LOCK).read_text())["beats"] == 1
    lock.release()


def test_bucket_that_cannot_be_locked_is_an_error(remote: Path, monkeypatch) -> None:
    monkeypatch.setattr(buckets.FakeBackend, "pipe_file", unsupported)
    with pytest.raises(CheckpointError, match=r"cannot lock gs://bucket/run: .*not supported"):
        BucketLock(RUN, pytest.fail).acquire()


if __name__ == "__main__":
    hold(Path(sys.argv[1]))
