"""Locks of run directories, so that only one run at a time writes to a directory.

The first process of a run holds the lock for all of its processes. A run that is killed leaves the
file of its lock, which the next run recognizes as stale:

* On a disk the file is locked with `flock`, which ends with the process. If the file system does
  not share such locks between hosts, or does not support them, the host and the process named in
  the file decide: a process of this host can be looked up, one of another host cannot.
* In a bucket the owner renews an object every `HEARTBEAT` seconds. It is stale if it has not
  changed for `SILENCE` seconds, or at once if it names a process of this host that has ended. The
  clocks of two hosts are never compared.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import fsspec
import psutil

from prefix_jax.errors import CheckpointError, ConfigError, PrefixJaxError, reason
from prefix_jax.untrusted.json import parse_json
from prefix_jax.untrusted.paths import explain

LOCK = ".prefix-jax.lock"
HEARTBEAT = 20.0
SILENCE = 120.0

_MOST_BYTES = 4096
# File systems of a single host, on which `flock` succeeds only if no process holds the lock.
_LOCAL = frozenset(
    "apfs bcachefs btrfs ext2 ext3 ext4 f2fs hfs jfs overlay ramfs reiserfs tmpfs xfs zfs".split()
)


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        host: the name of its host.
        pid: its process id on that host.
        started: identifies the start of the process, because process ids are reused.
        since: when it acquired the lock, for messages.
        token: unique to this lock.
    """

    host: str
    pid: int
    started: str
    since: str
    token: str

    @classmethod
    def of_this_process(cls) -> Owner:
        now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _start(pid) or "", now, secrets.token_hex(8))

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, since {self.since}"

    @property
    def here(self) -> bool:
        """True if the process runs, or ran, on this host."""
        return self.host == socket.gethostname()

    @property
    def alive(self) -> bool:
        """True if the process still runs. Meaningful only if it is on this host."""
        start = _start(self.pid)
        return start is not None and (not start or not self.started or start == self.started)


class Lock(abc.ABC):
    """A lock that is acquired or refused, without waiting for its owner to end."""

    @abc.abstractmethod
    def acquire(self) -> None:
        """Acquires the lock.

        Raises:
            ConfigError: another process holds it.
            CheckpointError: it cannot be written.
        """

    @abc.abstractmethod
    def release(self) -> None:
        """Releases the lock. Never fails."""

    def check(self) -> None:  # noqa: B027
        """Checks that the lock is still held.

        Raises:
            CheckpointError: another process took it over.
        """


class FileLock(Lock):
    """The lock of a directory on disk.

    Args:
        directory: the directory, created if missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / LOCK
        self._descriptor: int | None = None
        self._created: list[Path] = []

    def acquire(self) -> None:
        parents = [self._directory, *self._directory.parents]
        try:
            self._created = list(takewhile(lambda parent: not parent.exists(), parents))
            self._directory.mkdir(parents=True, exist_ok=True)
            # Repeats if the owner removed the file between two of these calls.
            while not self._try():
                pass
        except OSError as error:
            self._remove_created()
            raise CheckpointError(
                f"cannot write to {self._directory}: {explain(error)}; choose another output_dir"
            ) from error
        except PrefixJaxError:
            self._remove_created()
            raise

    def _try(self) -> bool:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor, created = os.open(self._path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            try:
                descriptor, created = os.open(self._path, flags), False
            except FileNotFoundError:
                return False
        try:
            locked = _flock(descriptor)
            if not _is(self._path, descriptor):
                return False
            before = None if created else _read(os.pread(descriptor, _MOST_BYTES, 0))
            if locked is False or not self._is_stale(before, created, locked is True):
                raise ConfigError(self._refusal(before, certain=locked is False))
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _write(Owner.of_this_process()), 0)
            os.fsync(descriptor)
            self._descriptor, descriptor = descriptor, -1
            return True
        finally:
            if descriptor != -1:
                os.close(descriptor)

    def _is_stale(self, before: Owner | None, created: bool, locked: bool) -> bool:
        """Returns whether the owner of an existing lock file is gone.

        Args:
            before: the owner named in the file.
            created: whether this process created the file.
            locked: whether this process acquired the file's `flock`, if it is supported.
        """
        if created or (locked and (before is None or _is_local(self._directory))):
            return True
        return before is not None and before.here and not before.alive

    def _refusal(self, owner: Owner | None, certain: bool) -> str:
        """Explains why the lock was refused.

        Args:
            owner: the owner named in the file.
            certain: whether its process is known to be running.
        """
        if owner is None:
            return (
                f"{self._directory}: locked by another process; wait until it ends, or choose "
                f"another output_dir (if there is no such process, remove {self._path})"
            )
        if owner.here or certain:
            return (
                f"{self._directory}: another run is writing there ({owner}); wait until it ends, "
                "stop it, or choose another output_dir"
            )
        return (
            f"{self._directory}: locked by a run on another host ({owner}); "
            f"{socket.gethostname()} cannot check whether that run has ended. If it has, remove "
            f"{self._path} and start again; otherwise choose another output_dir"
        )

    def release(self) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            if _is(self._path, self._descriptor):
                self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = None
        self._remove_created()

    def _remove_created(self) -> None:
        """Removes the directories that this lock created, unless they have content."""
        for path in self._created:
            try:
                path.rmdir()
            except OSError:
                return


class BucketLock(Lock):
    """The lock of a directory in a bucket.

    Args:
        directory: the directory, gs://BUCKET/PATH.
        message: receives a line before a wait for the owner's next heartbeat.
        sleep: sleeps for a number of seconds.
    """

    def __init__(
        self,
        directory: str,
        message: Callable[[str], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._directory = directory
        self._path = f"{directory}/{LOCK}"
        self._message, self._sleep = message, sleep
        # fsspec, because epath has neither a create-only mode nor uncached reads.
        self._files = fsspec.filesystem("gs")
        self._owner: Owner | None = None
        self._lost: str | None = None
        self._beats = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        owner = Owner.of_this_process()
        try:
            while not self._create(owner):
                self._wait_until_stale()
        # gcsfs and its dependencies have no common base class of errors.
        except PrefixJaxError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"cannot lock {self._directory}: {reason(error)}; check that the bucket exists and "
                "that this account may write to it"
            ) from error
        self._owner, self._lost = owner, None
        self._ended.clear()
        self._thread = threading.Thread(target=self._beat_until_ended, daemon=True)
        self._thread.start()

    def _create(self, owner: Owner) -> bool:
        try:
            self._files.pipe_file(self._path, _write(owner), mode="create")
        except FileExistsError:
            # A request that is repeated after a lost response finds its own object.
            held = _read(self._content() or b"")
            return held is not None and held.token == owner.token
        return True

    def _wait_until_stale(self) -> None:
        """Deletes the object if its owner is gone; raises ConfigError otherwise."""
        before = self._content()
        if before is None:
            return
        owner = _read(before)
        if owner is None or not owner.here or owner.alive:
            name = str(owner) if owner else "by an unknown process"
            self._message(
                f"{self._directory} is locked ({name}); waiting {SILENCE:.0f} s for a heartbeat"
            )
            waited = 0.0
            while waited < SILENCE:
                self._sleep(HEARTBEAT / 4)
                waited += HEARTBEAT / 4
                content = self._content()
                if content is None:
                    return
                if content != before:
                    raise ConfigError(
                        f"{self._directory}: another run is writing there "
                        f"({_read(content) or name}); wait until it ends, stop it, or choose "
                        "another output_dir"
                    )
        if self._content() == before:
            self._delete()

    def release(self) -> None:
        if self._owner is None or self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):
            held = _read(self._content() or b"")
            if held is not None and held.token == self._owner.token:
                self._delete()
        self._owner = None

    def check(self) -> None:
        if self._lost is not None:
            raise CheckpointError(
                f"{self._directory}: {self._lost}; this run stops, because only one run may write "
                "to a directory"
            )

    def _beat_until_ended(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            self.beat()

    def beat(self) -> None:
        """Renews the lock, or records that it was lost."""
        assert self._owner is not None
        # A failure may be temporary.
        with contextlib.suppress(Exception):
            content = self._content()
            held = _read(content or b"")
            if content is None:
                self._lost = f"its lock {self._path} was removed"
            elif held is None or held.token != self._owner.token:
                self._lost = f"another run took the lock over ({held})"
            else:
                self._beats += 1
                self._files.pipe_file(self._path, _write(self._owner, self._beats))

    def _content(self) -> bytes | None:
        try:
            content: bytes = self._files.cat_file(self._path)
            return content
        except FileNotFoundError:
            return None

    def _delete(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path)


def _write(owner: Owner, beats: int = 0) -> bytes:
    return (json.dumps({**dataclasses.asdict(owner), "beats": beats}) + "\n").encode()


def _read(content: bytes) -> Owner | None:
    """Returns the owner named in a lock; None if it is malformed."""
    try:
        text = content[:_MOST_BYTES].decode()
        fields = parse_json(text, LOCK, ConfigError)
        owner = Owner(**{field.name: fields[field.name] for field in dataclasses.fields(Owner)})
    except (UnicodeDecodeError, ConfigError, KeyError, TypeError):
        return None
    texts = (owner.host, owner.started, owner.since, owner.token)
    whole = type(owner.pid) is int and all(isinstance(text, str) for text in texts)
    return owner if whole else None


def _flock(descriptor: int) -> bool | None:
    """Returns whether an open file could be locked; None if the file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is(path: Path, descriptor: int) -> bool:
    """Returns whether a path still refers to an open file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _start(pid: int) -> str | None:
    """Identifies the start of a process of this host.

    Returns:
        None if there is no such process, "" if its start is unknown.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        # In ticks since the host booted, which unlike the time of day is never adjusted.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except psutil.NoSuchProcess:
        return None
    except (OSError, IndexError):
        # Not Linux.
        with contextlib.suppress(psutil.Error):
            return str(int(psutil.Process(pid).create_time()))
        return None
    except psutil.Error:
        return ""


def _is_local(path: Path) -> bool:
    """Returns whether a path is on a file system of this host only."""
    resolved = path.resolve()
    best, kind = -1, ""
    for partition in psutil.disk_partitions(all=True):
        mount = Path(partition.mountpoint)
        if resolved.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), partition.fstype
    return kind in _LOCAL
