"""Streams a checkpoint's tensors into sharded parameters, one parameter at a time.

At any time, host memory holds at most the parameters that are already placed, the one that is being
stacked, and one tensor of the checkpoint; quantised parameters are held only in quantised form.
Files are mapped tensor by tensor, so their pages leave memory with the tensor, and only the slices
that this host's devices hold are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from prefix_jax.backbones.families.names import Shape
from prefix_jax.backbones.loading.match import Parameter
from prefix_jax.errors import BackboneError
from prefix_jax.nn.quantized import QTensor, quantize_like
from prefix_jax.untrusted.json import read_json_object
from prefix_jax.untrusted.paths import expand
from prefix_jax.untrusted.safetensors import SafeTensor, read_header, read_tensor
from prefix_jax.validation import require

_NAMES_IN_MESSAGE = 5
_PART = 1 << 22  # values quantised at a time


class TensorSource(Protocol):
    """A checkpoint of named tensors."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of every tensor, by name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor of any floating dtype. The caller must not write to it."""
        ...


class Safetensors:
    """The safetensors checkpoint of a directory: one file, or shards with an index.

    Raises:
        BackboneError: a file is absent, truncated or corrupt, or the weights are a pickle.
    """

    def __init__(self, directory: Path):
        self.shapes: dict[str, Shape] = {}
        self._tensors: dict[str, tuple[Path, SafeTensor]] = {}
        for file in _safetensors_files(directory):
            for name, tensor in read_header(file, BackboneError).items():
                if name in self._tensors:
                    raise BackboneError(
                        f"{file}: {name} is also in {self._tensors[name][0].name}; keep one of them"
                    )
                self.shapes[name] = tensor.shape
                self._tensors[name] = file, tensor

    def read(self, name: str) -> np.ndarray:
        """Maps one tensor from its file.

        Raises:
            BackboneError: it is not of a floating dtype. Files may contain such tensors: some
                encoders store their position ids.
        """
        file, tensor = self._tensors[name]
        return read_tensor(file, name, tensor, BackboneError)


def _safetensors_files(directory: Path) -> list[Path]:
    single, index = (
        expand(directory / name, BackboneError)
        for name in ("model.safetensors", "model.safetensors.index.json")
    )
    if single.is_file():
        return [single]
    if index.is_file():
        content = read_json_object(index, BackboneError).get("weight_map")
        weight_map: dict[str, str] = require(
            content, dict[str, str], f"{index}: weight_map", BackboneError
        )
        files = [directory / name for name in sorted(set(weight_map.values()))]
        if outside := [file for file in files if file.parent != directory or file.name == ".."]:
            raise BackboneError(f"{index} names {outside[0]}, which is not a file in its directory")
        if absent := [file.name for file in files if not expand(file, BackboneError).is_file()]:
            names = ", ".join(absent[:_NAMES_IN_MESSAGE]) + (
                ", …" if len(absent) > _NAMES_IN_MESSAGE else ""
            )
            raise BackboneError(f"{index} names missing files: {names}")
        return files
    if pickles := sorted(directory.glob("*.bin")):
        raise BackboneError(
            f"{directory} has its weights in {pickles[0].name}, a pickle, which is never read "
            "because loading it can run any code; if you trust it, convert it with transformers: "
            "AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory)"
        )
    raise BackboneError(f"{directory} has no model.safetensors and no {index.name}")


def stream(
    parameters: Iterable[Parameter],
    source: TensorSource,
    abstract: Mapping[str, Any],
    shardings: Mapping[str, Any],
) -> dict[str, Any]:
    """Reads parameters into device memory.

    Args:
        parameters: the parameters and their tensors, from `match`.
        source: the checkpoint.
        abstract: the abstract parameter tree; a `QTensor` is quantised while it is read.
        shardings: a tree of shardings of the same structure.

    Returns:
        The parameter tree of committed arrays.
    """
    like, sharding_of = flatten_dict(dict(abstract)), flatten_dict(dict(shardings))
    leaves = {}
    # Large parameters come first, so that the peak is early, with little else in memory.
    for parameter in sorted(parameters, key=lambda p: math.prod(p.shape), reverse=True):
        path = parameter.path
        leaves[path] = _place(parameter, source, like[path], sharding_of[path])
    return unflatten_dict(leaves)


def _place(parameter: Parameter, source: TensorSource, like: Any, shardings: Any) -> Any:
    abstract, structure = jax.tree.flatten(like)
    arrays = [
        _Shards(leaf.shape, leaf.dtype, sharding)
        for leaf, sharding in zip(abstract, jax.tree.leaves(shardings), strict=True)
    ]
    for layer, name in enumerate(parameter.names):
        shape = parameter.shape[1:] if parameter.stacked else parameter.shape
        tensor: Any = parameter.storage(source.read(name), shape)
        if isinstance(like, QTensor):
            tensor = _quantised(tensor, like)
        for array, values in zip(arrays, jax.tree.leaves(tensor), strict=True):
            array.fill(layer if parameter.stacked else None, values)
    return jax.tree.unflatten(structure, [array.place() for array in arrays])


def _quantised(tensor: np.ndarray, like: QTensor) -> QTensor:
    """Quantises a tensor part by part. Rounding works in float32, in which the whole tensor would
    need several times the memory of the result."""
    blocks = like.scale.shape[-tensor.ndim :]
    # An axis along which every index has its own scales.
    axis = max(
        (axis for axis in range(tensor.ndim) if blocks[axis] == tensor.shape[axis]),
        key=lambda axis: tensor.shape[axis],
    )
    count = min(tensor.shape[axis], -(-tensor.size // _PART))
    parts = [quantize_like(part, like) for part in np.array_split(tensor, count, axis)]
    whole: QTensor = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis), *parts)
    return whole


class _Shards:
    """The shards of one array on this host's devices, filled layer by layer."""

    def __init__(self, shape: Shape, dtype: np.dtype, sharding: jax.sharding.Sharding) -> None:
        self._shape, self._sharding = shape, sharding
        self._parts = {
            key: _aligned(tuple(stop - start for start, stop in key), np.dtype(dtype))
            for key in map(self._bounds, sharding.addressable_devices_indices_map(shape).values())
        }

    def _bounds(self, index: tuple[slice, ...] | None) -> tuple[tuple[int, int], ...]:
        return tuple(s.indices(n)[:2] for s, n in zip(index or (), self._shape, strict=True))

    def fill(self, layer: int | None, values: np.ndarray) -> None:
        """Copies the values of one layer, or of the whole array for None, into the shards."""
        for key, part in self._parts.items():
            if layer is None:
                part[...] = values[tuple(slice(*b) for b in key)]
                continue
            (first, end), *rest = key
            if first <= layer < end:
                part[layer - first] = values[tuple(slice(*b) for b in rest)]

    def place(self) -> jax.Array:
        """Returns the array in device memory."""
        return jax.make_array_from_callback(
            self._shape, self._sharding, lambda index: self._parts[self._bounds(index)]
        )


def _aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary, which the CPU backend adopts uncopied."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
