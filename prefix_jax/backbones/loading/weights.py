"""Streams a checkpoint's tensors into sharded parameters, one parameter at a time.

Host memory never holds more than the parameters that are placed already, the one that is being
stacked, and one tensor of the checkpoint; of quantised parameters, no more than what they become
and that tensor. Files are mapped tensor by tensor, so that their pages leave memory with the
tensor, and only the slices that this host's devices hold are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from prefix_jax.backbones.families.names import Parameter, Shape
from prefix_jax.errors import BackboneError
from prefix_jax.nn.quantized import QTensor, quantize_like
from prefix_jax.untrusted.json import read_json_object
from prefix_jax.untrusted.paths import expand
from prefix_jax.untrusted.safetensors import SafeTensor, read_header, read_tensor
from prefix_jax.validation import require

_NAMED = 5  # files in a message
_PART = 1 << 22  # numbers that are quantised at a time


class TensorSource(Protocol):
    """A checkpoint of named tensors."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of every tensor, by name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, of any floating dtype; the caller does not write to it."""
        ...


class Safetensors:
    """The `model.safetensors` of a directory, in one file or in shards with an index.

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
                        f"{file}: {name} is in {self._tensors[name][0].name} too; keep one of them"
                    )
                self.shapes[name] = tensor.shape
                self._tensors[name] = file, tensor

    def read(self, name: str) -> np.ndarray:
        """One tensor, mapped from its file.

        Raises:
            BackboneError: it does not hold floating-point numbers. Files may: some encoders' hold
                their positions, counted out.
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
            raise BackboneError(f"{index} names {outside[0]}, which is not a file beside it")
        if absent := [file.name for file in files if not expand(file, BackboneError).is_file()]:
            names = ", ".join(absent[:_NAMED]) + (", …" if len(absent) > _NAMED else "")
            raise BackboneError(f"{index} names files that are not there: {names}")
        return files
    if pickles := sorted(directory.glob("*.bin")):
        raise BackboneError(
            f"{directory} has its weights in {pickles[0].name}, a pickle, which is never read: "
            "loading one can run any code. Convert it where you trust it, with transformers: "
            "AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory)"
        )
    raise BackboneError(f"{directory} has no model.safetensors and no {index.name}")


def stream(
    parameters: Iterable[Parameter],
    source: TensorSource,
    abstract: Mapping[str, Any],
    shardings: Mapping[str, Any],
) -> dict[str, Any]:
    """Reads parameters into the devices' memory.

    Args:
        parameters: where each comes from, of `names.match`.
        source: the checkpoint.
        abstract: the parameter tree: the dtype of each, and how it is quantised where a `QTensor`
            stands.
        shardings: a tree of shardings of the same structure.

    Returns:
        The parameter tree, of committed arrays.
    """
    like, sharding_of = flatten_dict(dict(abstract)), flatten_dict(dict(shardings))
    leaves = {}
    # Large ones first: the peak is then early, while little else is in memory.
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
    """A tensor in few bits, some of its outputs at a time: in float32, as it is rounded, the whole
    of a large one would be several times the memory of what it becomes."""
    blocks = like.scale.shape[-tensor.ndim :]
    # An axis of which every index has scales of its own.
    axis = max(
        (axis for axis in range(tensor.ndim) if blocks[axis] == tensor.shape[axis]),
        key=lambda axis: tensor.shape[axis],
    )
    count = min(tensor.shape[axis], -(-tensor.size // _PART))
    parts = [quantize_like(part, like) for part in np.array_split(tensor, count, axis)]
    whole: QTensor = jax.tree.map(lambda *found: np.concatenate(found, axis), *parts)
    return whole


class _Shards:
    """What this host's devices hold of one array, filled layer by layer."""

    def __init__(self, shape: Shape, dtype: np.dtype, sharding: jax.sharding.Sharding) -> None:
        self._shape, self._sharding = shape, sharding
        self._parts = {
            key: _aligned(tuple(stop - start for start, stop in key), np.dtype(dtype))
            for key in map(self._bounds, sharding.addressable_devices_indices_map(shape).values())
        }

    def _bounds(self, index: tuple[slice, ...] | None) -> tuple[tuple[int, int], ...]:
        return tuple(s.indices(n)[:2] for s, n in zip(index or (), self._shape, strict=True))

    def fill(self, layer: int | None, values: np.ndarray) -> None:
        """Takes what it needs of one layer's values; of those of the whole array, for None."""
        for key, part in self._parts.items():
            if layer is None:
                part[...] = values[tuple(slice(*b) for b in key)]
                continue
            (first, end), *rest = key
            if first <= layer < end:
                part[layer - first] = values[tuple(slice(*b) for b in rest)]

    def place(self) -> jax.Array:
        """The array in the devices' memory."""
        return jax.make_array_from_callback(
            self._shape, self._sharding, lambda index: self._parts[self._bounds(index)]
        )


def _aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary, which the CPU backend adopts uncopied."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
