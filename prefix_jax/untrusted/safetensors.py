"""Reads safetensors files, after checking their header."""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from typing import Annotated, Any

import ml_dtypes
import numpy as np

from prefix_jax.errors import PrefixJaxError
from prefix_jax.untrusted.json import parse_json
from prefix_jax.untrusted.paths import expand, explain, open_binary
from prefix_jax.validation import Interval, matches

_Index = Annotated[int, Interval(ge=0, le=2**63 - 1)]
# Headers have about 120 bytes per tensor.
HEADER_LIMIT = 64 * 2**20
MAX_RANK = 8
MAX_NAME = 1000
# Bits per value of each dtype in the format's specification.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
_FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class SafeTensor:
    """The location of a tensor in its file.

    Attributes:
        dtype: the format's name of the dtype, such as "F32".
        shape: outermost axis first.
        offset: the offset of the first byte from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numpy_dtype(self) -> np.dtype | None:
        """The dtype in NumPy; None if it is not a floating-point type."""
        return _FLOATS.get(self.dtype)


def read_header(path: str | os.PathLike[str], error: type[PrefixJaxError]) -> dict[str, SafeTensor]:
    """Reads the names, dtypes, shapes and offsets of all tensors of a file.

    Args:
        path: a safetensors file.
        error: the class to raise.

    Raises:
        PrefixJaxError: of class `error`, if the file cannot be read, its header is malformed, or
            its tensors leave gaps, overlap, or do not match the size of the file.
    """
    try:
        with open_binary(path, error) as (file, size):
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, HEADER_LIMIT):
                raise _CorruptError(f"no header in its {size:,} bytes")
            header = file.read(length)
        try:
            text = header.decode("utf-8")
        except UnicodeDecodeError:
            raise _CorruptError("the header is not UTF-8") from None
        entries = parse_json(text, f"{path}: header", error, unique_keys=True)
        return _parse_entries(entries, 8 + length, size)
    except _CorruptError as failure:
        raise error(f"{path} is truncated or corrupt: {failure}; copy it again") from None


def read_tensor(
    path: str | os.PathLike[str], name: str, tensor: SafeTensor, error: type[PrefixJaxError]
) -> np.ndarray:
    """Maps a floating-point tensor into memory, read-only.

    Raises:
        PrefixJaxError: of class `error`, if the tensor has another dtype or the file cannot be
            mapped.
    """
    if tensor.dtype not in _FLOATS:
        raise error(f"{path}: {name} has dtype {tensor.dtype}; supported: {', '.join(_FLOATS)}")
    return map_array(path, _FLOATS[tensor.dtype], tensor.offset, tensor.shape, error)


def read_tensors(
    path: str | os.PathLike[str], error: type[PrefixJaxError]
) -> dict[str, np.ndarray]:
    """Reads all tensors of a file into memory.

    Raises:
        PrefixJaxError: of class `error`, if the file cannot be read or is damaged, or if a
            tensor is not floating-point.
    """
    header = read_header(path, error)
    return {name: np.array(read_tensor(path, name, x, error)) for name, x in header.items()}


def map_array(
    path: str | os.PathLike[str],
    dtype: np.dtype,
    offset: int,
    shape: tuple[int, ...],
    error: type[PrefixJaxError],
) -> np.ndarray:
    """Maps a part of a file into memory as a read-only array."""
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    try:
        return np.memmap(expand(path, error), dtype, mode="r", offset=offset, shape=shape)
    except (OSError, ValueError) as failure:
        raise error(f"{path}: cannot be mapped into memory ({explain(failure)})") from None


class _CorruptError(Exception):
    """A malformed header; the message describes the problem."""


def _parse_entries(entries: Any, start: int, size: int) -> dict[str, SafeTensor]:
    """Checks the parsed header of a file of `size` bytes whose tensor data begins at `start`."""
    if not isinstance(entries, dict):
        raise _CorruptError("the header is not an object")
    fields = {name: _check_entry(name, x) for name, x in entries.items() if name != "__metadata__"}
    tensors, end = {}, 0
    for name, entry in sorted(fields.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if begin != end:
            raise _CorruptError(f"{name!r} starts at byte {begin} of the data, expected {end}")
        if (stop - begin) * 8 != math.prod(shape) * _BITS[dtype]:
            raise _CorruptError(f"{name!r} has {stop - begin} bytes, wrong for {dtype} {shape}")
        tensors[name], end = SafeTensor(dtype, shape, start + begin), stop
    if start + end != size:
        raise _CorruptError(f"the header describes {start + end:,} bytes, the file has {size:,}")
    return tensors


def _check_entry(name: str, entry: Any) -> dict[str, Any]:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key, ()) for key in ("dtype", "shape", "data_offsets"))
    if len(name) > MAX_NAME:
        raise _CorruptError(f"a tensor has a name of {len(name):,} characters")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _CorruptError(f"{name!r} has the unknown dtype {str(dtype)[:80]!r}")
    if not matches(shape, list[_Index]) or len(shape) > MAX_RANK:
        raise _CorruptError(f"{name!r} has no valid shape")
    if not matches(offsets, list[_Index]) or len(offsets) != 2:
        raise _CorruptError(f"{name!r} has no valid data_offsets")
    return fields
