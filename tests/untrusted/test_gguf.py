"""GGUF headers: everything is checked against the file's size before it is allocated."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from prefix_jax.errors import BackboneError
from prefix_jax.untrusted.gguf import GGUFTensor, read_header
from prefix_jax.validation import PositiveInt
from tests.mutations import mutate_bytes, refusal

F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0
STRING, ARRAY, UINT32 = 8, 9, 4


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with every type of metadata and two tensors."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_float32("float", 0.5)
    writer.add_bool("flag", True)
    writer.add_int64("negative", -3)
    writer.add_array("tokens", ["a", "", "ж"])
    writer.add_array("scores", [0.5, -1.0])
    writer.add_array("flags", [True, False])
    writer.add_tensor("w", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("q", np.zeros((2, 2 * 34), np.uint8), raw_dtype=Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def info(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return string(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def write(path: Path, pairs: list[bytes], infos: list[bytes], data: int = 0) -> Path:
    header = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs)) + b"".join(pairs + infos)
    path.write_bytes(header + bytes(-len(header) % 32 + data))
    return path


def test_reads_files_of_the_library(file: Path) -> None:
    metadata, tensors = read_header(file, BackboneError)
    reader = gguf.GGUFReader(file)
    for key, value in metadata.values.items():
        assert reader.fields[key].contents() == value
    assert metadata.values["tokens"] == ["a", "", "ж"]
    offsets = {tensor.name: int(tensor.data_offset) for tensor in reader.tensors}
    assert tensors == {
        "w": GGUFTensor(F32, (2, 3), offsets["w"]),
        "q": GGUFTensor(Q8_0, (2, 64), offsets["q"]),
    }
    assert tensors["q"].stored_shape == (2, 68)


def test_metadata_is_type_checked(file: Path) -> None:
    metadata, _ = read_header(file, BackboneError)
    assert metadata.get("llama.block_count", PositiveInt) == 2
    assert metadata.get("absent", str, "default") == "default"
    with pytest.raises(BackboneError, match=r"model\.gguf: the metadata key absent is missing"):
        metadata.get("absent", str)
    with pytest.raises(
        BackboneError, match=r"metadata tokens must be a positive integer.*got \['a"
    ):
        metadata.get("tokens", PositiveInt)


@pytest.mark.parametrize(
    ("pairs", "infos", "message"),
    [
        (
            [pair("k", STRING, struct.pack("<Q", 2**63))],
            [],
            "k has 9,223,372,036,.* bytes",
        ),
        ([pair("k", STRING, string(b"\xff"))], [], "k is not UTF-8"),
        ([pair("k", 99, b"")], [], "k has the unknown type 99"),
        ([pair("k", UINT32, b"1234")] * 2, [], "the key 'k' appears twice"),
        ([pair("k", ARRAY, array(UINT32, 2**62))], [], "values of k do not fit"),
        ([pair("k", ARRAY, array(STRING, 2**40))], [], "values of k do not fit"),
        ([pair("k", ARRAY, array(STRING, 1, struct.pack("<Q", 2**40)))], [], "k does not fit"),
        ([pair("k", ARRAY, array(STRING, 1, string(b"\xff")))], [], "value 0 of k is not UTF-8"),
        ([pair("k", ARRAY, array(ARRAY, 1) * 9)], [], "nested more than 3"),
        ([], [info("w", (3,)), info("w", (3,), offset=32)], "'w' appears twice"),
        ([], [info("w", ())], "'w' has 0 axes"),
        ([], [info("w" * 5000, (3,))], "a tensor's name has 5,000 bytes"),
        ([pair("k" * 5000, UINT32, b"1234")], [], "a key has 5,000 bytes"),
        ([], [info("w", (1,) * 5)], "'w' has 5 axes"),
        ([], [info("w", (0,))], "impossible shape"),
        ([], [info("w", (33,), kind=8)], "impossible shape"),
        ([], [info("w", (3,), kind=77)], "unknown tensor type 77"),
        ([], [info("w", (10**12,))], "'w' extends beyond the end of the file"),
        ([], [info("w", (2**32, 2**32, 2**32))], "'w' extends beyond the end of the file"),
        ([], [info("w", (3,), offset=64)], "starts at byte 64 of the data, expected 0"),
        ([], [info("w", (3,)), info("v", (3,))], "'v' starts at byte 0 of the data, expected 32"),
        ([pair("general.alignment", UINT32, bytes(4))], [], "general.alignment is 0"),
    ],
)
def test_reports_malformed_headers(
    pairs: list[bytes], infos: list[bytes], message: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "model.gguf", pairs, infos, data=256)
    with pytest.raises(BackboneError, match=rf"model\.gguf is not a complete GGUF.*{message}"):
        read_header(file, BackboneError)


@pytest.mark.parametrize("counts", [(2**31, 0), (0, 2**31), (2**64 - 1, 2**64 - 1)])
def test_counts_are_limited_by_the_file_size(counts: tuple[int, int], tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(1000))
    with pytest.raises(BackboneError, match="do not fit the file"):
        read_header(file, BackboneError)


def test_string_that_became_an_array_is_rejected_immediately(file: Path) -> None:
    """After one flipped bit, the length of the string is read as a type and a count."""
    content = bytearray(file.read_bytes())
    at = content.index(b"general.architecture") + len("general.architecture")
    assert content[at] == STRING
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(BackboneError, match="is not a complete GGUF file"):
        read_header(file, BackboneError)


def test_reports_big_endian_files(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[4:8] = reversed(content[4:8])
    file.write_bytes(content)
    with pytest.raises(BackboneError, match="the file is big-endian; convert it"):
        read_header(file, BackboneError)


@pytest.mark.parametrize("span", [24, 120, None])
def test_mutated_files_read_or_raise_one_error(span: int | None, file: Path) -> None:
    rng = random.Random(0)
    content = file.read_bytes()
    refused = 0

    def read() -> None:
        _, tensors = read_header(file, BackboneError)
        size = file.stat().st_size
        assert all(t.offset + math.prod(t.stored_shape) <= size for t in tensors.values())

    for _ in range(300):
        file.write_bytes(mutate_bytes(content, rng, span))
        message = refusal(read, BackboneError)
        assert message is None or "model.gguf" in message
        refused += message is not None
    assert 100 < refused <= 300
