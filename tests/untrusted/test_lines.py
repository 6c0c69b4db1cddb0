"""Text files: limits, and errors that name the file and the line."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from prefix_jax.errors import DataError
from prefix_jax.untrusted.lines import check_text, read_lines


def test_counts_lines_and_skips_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\nfive")
    assert list(read_lines(path, DataError)) == [
        (1, "one\n"), (2, "two\n"), (3, "three\n"), (4, "\n"), (5, "five"),
    ]  # fmt: skip


def test_rejects_a_line_over_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ok\n" + "x" * 100)
    assert len(list(read_lines(path, DataError, line_limit=100))) == 2
    with pytest.raises(DataError, match=r"a\.txt:2: the line has more than 50 characters"):
        list(read_lines(path, DataError, line_limit=50))


def test_rejects_a_file_over_the_limit_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(DataError, match=r"a\.txt: larger than 8,589,934,592 bytes; split the file"):
        next(read_lines(path, DataError))


def test_limits_the_size_of_a_pipe() -> None:
    receiver, sender = os.pipe()
    thread = threading.Thread(target=lambda: (os.write(sender, b"ab\n" * 10), os.close(sender)))
    thread.start()
    try:
        with pytest.raises(DataError, match="larger than 20 bytes"):
            list(read_lines(f"/dev/fd/{receiver}", DataError, limit=20))
    finally:
        thread.join()
        os.close(receiver)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b\x08\x00", "not UTF-8 text but a gzip archive; unpack it"),
        (b"PK\x03\x04rest", "not UTF-8 text but a zip archive; unpack it"),
        (b"PAR1rest", "not UTF-8 text but a Parquet file"),
        ('{"x": 1}'.encode("utf-16"), "not UTF-8 text but UTF-16; convert it"),
        (b"ok\ngr\xfc\xdfe\n", r"a\.txt:2: not UTF-8 text \(character 3 .* 0xfc\); convert"),
        (b"ok\n\xed\xa0\x80\n", r"a\.txt:2: not UTF-8 text"),
    ],
)
def test_names_the_format_of_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_lines(tmp_path / "a.txt", DataError))


def test_rejects_values_that_cannot_be_written() -> None:
    check_text({"a": ["é", 1, None, b"\xff", float("nan")], 3: {"b": ()}}, "here", DataError)
    endless: list[Any] = []
    endless.append(endless)
    for value in ({"a": "x\ud800"}, {"a": [{"\udfff": 1}]}):
        with pytest.raises(DataError, match=r"here: not valid Unicode text: surrogates not"):
            check_text(value, "here", DataError)
    for value in ({"a": 10**5000}, {"a": endless}):
        with pytest.raises(DataError, match="here: cannot be written as JSON"):
            check_text(value, "here", DataError)
