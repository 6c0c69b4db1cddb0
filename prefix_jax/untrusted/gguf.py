"""Reads GGUF headers: metadata and tensor infos, checked against the size of the file.

The tensor types come from the `gguf` library. Its reader is not used, because it trusts every
length in the file and needs seconds for a vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import os
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from prefix_jax.errors import PrefixJaxError
from prefix_jax.untrusted.paths import open_binary
from prefix_jax.validation import require

# Bytes of metadata and tensor infos. A vocabulary of 256,000 tokens with merges has 20 MB.
HEADER_LIMIT = 128 * 2**20
MAX_RANK = 4
MAX_NAME = 1000

_VERSIONS = (2, 3)
_MAX_NESTING = 3
_NUMBERS: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("u1"),
    GGUFValueType.INT8: np.dtype("i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_MISSING: Any = object()


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """The location of a tensor in its file.

    Attributes:
        kind: the storage type.
        shape: outermost axis first.
        offset: the offset of the first byte from the start of the file.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in bytes. Quantised blocks run along the innermost axis."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return (*self.shape[:-1], self.shape[-1] // block * size)


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The metadata of a GGUF file.

    Attributes:
        where: the file, for messages.
        values: numbers, booleans, strings and lists by key, of unchecked types; read them with
            `get`.
        error: the class to raise.
    """

    where: str
    values: Mapping[str, Any]
    error: type[PrefixJaxError]

    def get(self, key: str, hint: Any, default: Any = _MISSING) -> Any:
        """Returns a value after checking its type.

        Args:
            key: the key, such as "llama.block_count".
            hint: the expected type and range, such as `PositiveInt` or `list[str]`.
            default: the value of a missing key; without a default, the key is required.

        Raises:
            PrefixJaxError: of class `error`, if the key is missing or its value does not match.
        """
        if key in self.values:
            return require(self.values[key], hint, f"{self.where}: metadata {key}", self.error)
        if default is _MISSING:
            raise self.error(f"{self.where}: the metadata key {key} is missing")
        return default


def read_header(
    path: str | os.PathLike[str], error: type[PrefixJaxError]
) -> tuple[Metadata, dict[str, GGUFTensor]]:
    """Reads the metadata and the locations of the tensors.

    Args:
        path: a GGUF file.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if the file cannot be read, is truncated or big-endian,
            or its header is malformed.
    """
    with open_binary(path, error) as (file, size):
        try:
            if size == 0:
                raise _CorruptError("the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _Header(data)
                return Metadata(str(path), header.metadata, error), header.tensors
        except _ByteOrderError:
            raise error(
                f"{path}: the file is big-endian; convert it with gguf-convert-endian"
            ) from None
        except _CorruptError as failure:
            raise error(f"{path} is not a complete GGUF file: {failure}; copy it again") from None


class _CorruptError(Exception):
    """A malformed header; the message describes the problem."""


class _ByteOrderError(Exception):
    """A big-endian file."""


class _Header:
    """A parser of a header that checks every length against the size of the file."""

    def __init__(self, data: mmap.mmap):
        self._data, self._at, self._end = data, 0, min(len(data), HEADER_LIMIT)
        if self._take(4) != b"GGUF":
            raise _CorruptError("it does not start with GGUF")
        version = self._u32()
        if version & 0xFFFF == 0:
            raise _ByteOrderError
        if version not in _VERSIONS:
            raise _CorruptError(f"version {version}, expected one of {_VERSIONS}")
        # Minimum sizes: a tensor info has a length, a rank, a type and an offset; a key-value pair
        # has a length and a type.
        tensors, pairs = self._count(24, "tensors"), self._count(13, "keys")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string("a key", MAX_NAME)
            if key in self.metadata:
                raise _CorruptError(f"the key {key!r} appears twice")
            self.metadata[key] = self._value(self._type(key), key)
        infos = [self._info() for _ in range(tensors)]
        self.tensors = self._place(infos)

    def _take(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > self._end:
            raise _CorruptError(f"the header ends after {self._end:,} bytes")
        return self._data[start : self._at]

    def _u32(self) -> int:
        return int(_U32.unpack(self._take(4))[0])

    def _u64(self) -> int:
        return int(_U64.unpack(self._take(8))[0])

    def _count(self, size: int, what: str) -> int:
        """Reads the number of items that follow, each of at least `size` bytes."""
        count = self._u64()
        if count * size > self._end - self._at:
            raise _CorruptError(f"{count:,} {what} do not fit the file")
        return count

    def _string(self, what: str, longest: int = HEADER_LIMIT) -> str:
        length = self._u64()
        if length > longest:
            raise _CorruptError(f"{what} has {length:,} bytes")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise _CorruptError(f"{what} is not UTF-8") from None

    def _type(self, key: str) -> GGUFValueType:
        with contextlib.suppress(ValueError):
            return GGUFValueType(number := self._u32())
        raise _CorruptError(f"{key} has the unknown type {number}")

    def _value(self, kind: GGUFValueType, key: str, nesting: int = 0) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string(key)
        if kind != GGUFValueType.ARRAY:
            return self._numbers(kind, 1)[0]
        if nesting == _MAX_NESTING:
            raise _CorruptError(f"{key} has arrays nested more than {_MAX_NESTING} levels deep")
        kind = self._type(key)
        if kind in _NUMBERS:
            return self._numbers(kind, self._count(_NUMBERS[kind].itemsize, f"values of {key}"))
        count = self._count(8, f"values of {key}")
        if kind == GGUFValueType.STRING:
            return self._strings(count, key)
        return [self._value(kind, key, nesting + 1) for _ in range(count)]

    def _numbers(self, kind: GGUFValueType, count: int) -> list[Any]:
        dtype = _NUMBERS[kind]
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()

    def _strings(self, count: int, key: str) -> list[str]:
        """Reads many strings: a faster `_string` for vocabularies."""
        data, at, end, size_at = self._data, self._at, self._end, _U64.unpack_from
        strings = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + size_at(data, at)[0]
                if at > end:
                    raise _CorruptError(f"{key} does not fit the file")
                strings.append(str(data[start:at], "utf-8"))
        except UnicodeDecodeError:
            raise _CorruptError(f"value {len(strings)} of {key} is not UTF-8") from None
        except struct.error:
            raise _CorruptError(f"{key} does not fit the file") from None
        self._at = at
        return strings

    def _info(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._string("a tensor's name", MAX_NAME)
        rank = self._u32()
        if not 1 <= rank <= MAX_RANK:
            raise _CorruptError(f"{name!r} has {rank} axes, expected 1 to {MAX_RANK}")
        shape = tuple(reversed([self._u64() for _ in range(rank)]))
        number = self._u32()
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise _CorruptError(f"{name!r} has the unknown tensor type {number}") from None
        block, _ = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise _CorruptError(f"{name!r} of type {kind.name} has the impossible shape {shape}")
        return name, kind, shape, self._u64()

    def _place(
        self, infos: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int]]
    ) -> dict[str, GGUFTensor]:
        """Returns the tensors by name. As in llama.cpp, there must be no gaps between them."""
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**16:
            raise _CorruptError(f"general.alignment is {alignment!r}")
        start, end = _padded(self._at, alignment), 0
        tensors: dict[str, GGUFTensor] = {}
        for name, kind, shape, offset in infos:
            if name in tensors:
                raise _CorruptError(f"the tensor {name!r} appears twice")
            if offset != end:
                raise _CorruptError(f"{name!r} starts at byte {offset} of the data, expected {end}")
            block, size = GGML_QUANT_SIZES[kind]
            stop = offset + math.prod(shape) // block * size
            if start + stop > len(self._data):
                raise _CorruptError(
                    f"{name!r} extends beyond the end of the file ({len(self._data):,} bytes)"
                )
            tensors[name], end = GGUFTensor(kind, shape, start + offset), _padded(stop, alignment)
        return tensors


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
