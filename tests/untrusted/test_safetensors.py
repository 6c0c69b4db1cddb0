"""Safetensors: checks of the header before any tensor is read."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from prefix_jax.errors import BackboneError
from prefix_jax.untrusted.safetensors import read_header, read_tensors
from tests.mutations import mutate_bytes, mutate_json, refusal

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=ml_dtypes.bfloat16),
    "c": np.zeros((0, 3), np.float32),
    "d": np.array(7, np.float32),
}


def write(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def header(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


def test_reads_files_of_the_library(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "f.safetensors", metadata={"format": "pt"})
    tensors = read_tensors(tmp_path / "f.safetensors", BackboneError)
    assert tensors.keys() == TENSORS.keys()
    for name, x in TENSORS.items():
        assert tensors[name].dtype == x.dtype
        np.testing.assert_array_equal(tensors[name], x)


@pytest.mark.parametrize(
    ("content", "data", "message"),
    [
        (header(dtype="F99"), b"8 bytes.", "'x' has the unknown dtype 'F99'"),
        (header(dtype=["F32"]), b"8 bytes.", "unknown dtype"),
        (header(shape=[-2]), b"8 bytes.", "'x' has no valid shape"),
        (header(shape=[2.0]), b"8 bytes.", "'x' has no valid shape"),
        (header(shape=[True] * 2), b"8 bytes.", "'x' has no valid shape"),
        (header(shape=[1] * 9), b"8 bytes.", "'x' has no valid shape"),
        (header(shape=[10**12]), b"8 bytes.", "'x' has 8 bytes"),
        (header(shape=[2**32, 2**32]), b"8 bytes.", "'x' has 8 bytes"),
        (header(data_offsets=[8, 0]), b"8 bytes.", "expected 0"),
        (header(data_offsets=[0, 2**63]), b"8 bytes.", "no valid data_offsets"),
        (header(data_offsets=[4, 12]), b"12 bytes....", "starts at byte 4 of the data, expected 0"),
        (header() | {"y": header()["x"]}, b"8 bytes.", "starts at byte 0 of the data, expected 8"),
        (header(), b"7 bytes", "describes .* bytes, the file has"),
        (header(), b"9 bytes..", "describes .* bytes, the file has"),
        ({"x": None}, b"", "unknown dtype"),
        ({"x" * 5000: None}, b"", "a tensor has a name of 5,000 characters"),
        ([], b"", "not an object"),
        (b"{" * 3000, b"", "JSON"),
        (b'{"x": 1, "x": 1}', b"", "'x' appears twice"),
        (b'{"\xff": 1}', b"", "not UTF-8"),
    ],
)
def test_reports_malformed_headers(content: Any, data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=rf"f\.safetensors.*{message}"):
        read_header(write(tmp_path / "f.safetensors", content, data), BackboneError)


@pytest.mark.parametrize("length", [0, 1, 10**4, 2**40, 2**64 - 1])
def test_header_length_is_limited_by_the_file_size(length: int, tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(BackboneError, match="truncated or corrupt: no header"):
        read_header(file, BackboneError)


def test_integer_tensors_are_listed_but_not_read(tmp_path: Path) -> None:
    save_file({"ids": np.arange(3)}, tmp_path / "f.safetensors")
    assert read_header(tmp_path / "f.safetensors", BackboneError)["ids"].shape == (3,)
    with pytest.raises(BackboneError, match="ids has dtype I64; supported: F64"):
        read_tensors(tmp_path / "f.safetensors", BackboneError)


@pytest.mark.parametrize("kind", ["missing", "directory", "unreadable"])
def test_reports_files_that_cannot_be_opened(kind: str, tmp_path: Path) -> None:
    file = tmp_path / ("x" * 300 if kind == "unreadable" else "f.safetensors")
    if kind == "directory":
        file.mkdir()
    with pytest.raises(BackboneError, match=r"no such file|a directory|cannot be used as a path"):
        read_header(file, BackboneError)


def test_mutated_files_read_or_raise_one_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    content = save(TENSORS)
    length = struct.unpack("<Q", content[:8])[0]
    entries, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    refused = 0
    file = tmp_path / "f.safetensors"
    for attempt in range(600):
        if attempt % 2:
            file.write_bytes(mutate_bytes(content, rng))
        else:
            write(file, mutate_json(entries, rng), data)
        message = refusal(lambda: read_tensors(file, BackboneError), BackboneError)
        assert message is None or file.name in message
        refused += message is not None
    assert 300 < refused < 580
