import os
import threading
from pathlib import Path

import pytest

from prefix_jax.errors import DataError
from prefix_jax.untrusted.paths import expand, read_bytes, read_text


def test_accepts_a_path_that_does_not_exist_yet(tmp_path: Path):
    assert expand(tmp_path / "new" / "deeper", DataError) == tmp_path / "new" / "deeper"


def test_expands_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/x", DataError) == tmp_path / "x"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nosuchuser/x", "cannot expand ~"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null byte"),
    ],
)
def test_reports_impossible_paths(path: str, message: str):
    with pytest.raises(DataError, match=message):
        expand(path, DataError)
    with pytest.raises(DataError, match=message):
        read_text(path, DataError)


def test_reports_a_loop_of_symbolic_links(tmp_path: Path):
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match=r"loop\.json: cannot be used as a path \(.*symbolic"):
        read_text(loop, DataError)


def test_reports_files_that_are_not_regular(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("pipe", "a named pipe"), ("", "a directory")):
        with pytest.raises(DataError, match=f"expected a regular file, got {kind}"):
            read_bytes(tmp_path / name, DataError)
    with pytest.raises(DataError, match="absent: no such file"):
        read_bytes(tmp_path / "absent", DataError)
    with pytest.raises(DataError, match="a device"):
        read_bytes("/dev/zero", DataError)


def test_reads_a_process_substitution():
    receiver, sender = os.pipe()
    thread = threading.Thread(target=lambda: (os.write(sender, b"{}"), os.close(sender)))
    thread.start()
    try:
        assert read_bytes(f"/dev/fd/{receiver}", DataError) == b"{}"
    finally:
        thread.join()
        os.close(receiver)


def test_rejects_a_file_over_the_limit(tmp_path: Path):
    (tmp_path / "large").write_bytes(b"x" * 11)
    assert read_bytes(tmp_path / "large", DataError, limit=11) == b"x" * 11
    with pytest.raises(DataError, match="larger than 10 bytes"):
        read_bytes(tmp_path / "large", DataError, limit=10)


def test_names_the_byte_that_is_not_utf8(tmp_path: Path):
    (tmp_path / "latin").write_bytes("größer".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 text \(.* at byte 2\)"):
        read_text(tmp_path / "latin", DataError)


def test_drops_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "marked").write_text("a", encoding="utf-8-sig")
    assert read_text(tmp_path / "marked", DataError) == "a"
