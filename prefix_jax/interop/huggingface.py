"""Writes a backbone from GGUF as a directory in Hugging Face layout, for programs that read those.

The weights are dequantised. One file of weights at a time is in memory.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.families import FAMILIES
from prefix_jax.backbones.families.names import Matrix, Row, Vector
from prefix_jax.backbones.loading import gguf
from prefix_jax.backbones.loading.config import read_architecture
from prefix_jax.backbones.loading.find import find
from prefix_jax.backbones.loading.match import Parameter, match
from prefix_jax.backbones.loading.pretrained import Dtype
from prefix_jax.backbones.loading.quantized import abstract_params
from prefix_jax.backbones.loading.tokenizer import load_tokenizer
from prefix_jax.data.special import end_tokens
from prefix_jax.errors import BackboneError, CheckpointError
from prefix_jax.untrusted.paths import expand

# Bytes of weights per file.
_SHARD = 4 << 30


def write_huggingface(source: str | Path, output: str | Path, dtype: Dtype = "float32") -> None:
    """Writes the model of a GGUF file as `config.json`, safetensors and tokenizer files.

    Args:
        source: the GGUF file, or a package that contains one.
        output: the directory to write, which must be absent or empty.
        dtype: of the weights.

    Raises:
        BackboneError: the source is not a GGUF file or cannot be read, or the output is not empty.
        CheckpointError: the directory cannot be written.
    """
    path = find(source)
    if path.is_dir():
        raise BackboneError(f"{path} is a directory already; give a GGUF file")
    output = expand(output, BackboneError)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise BackboneError(f"{output} exists and is not an empty directory; choose another one")
    file, arch = gguf.open_gguf(path), read_architecture(path)
    abstract = abstract_params(Backbone(arch))
    parameters = match(gguf.TABLES[file.architecture], abstract, file.shapes, str(path))
    tokenizer = load_tokenizer(path, arch.vocab)
    ends = end_tokens(tokenizer, arch.end_ids)
    config = file.config()
    config |= {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    tensors = _tensors(arch, parameters, file, jnp.dtype(dtype))
    try:
        output.mkdir(parents=True, exist_ok=True)
        _write_json(output / "config.json", config)
        _write_json(output / "generation_config.json", {"eos_token_id": list(ends)})
        tokenizer.save_pretrained(output)
        _write_weights(output, tensors)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the model to {output}: {error.strerror}; free disk space or choose "
            "another directory"
        ) from error


def _tensors(
    arch: Architecture, parameters: list[Parameter], file: gguf.GGUF, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor with its Hugging Face name."""
    table = FAMILIES[arch.model_type].hf_names(arch)
    head = None if table.tokens is None else table.tokens.head
    by_path = {"/".join(parameter.path): parameter for parameter in parameters}
    # Several parameters are fused in one tensor, such as GPT-2's queries, keys and values.
    fused: dict[str, list[Row]] = defaultdict(list)
    for row in table.rows:
        if row.path in by_path:
            fused[row.name].append(row)
    for name, rows in fused.items():
        name = name if name == head else table.prefix + name
        for layer in range(len(by_path[rows[0].path].names)):
            parts = [_read(by_path[row.path], layer, file) for row in rows]
            yield name.format(l=layer), _fuse(rows, parts).astype(dtype)


def _read(parameter: Parameter, layer: int, file: gguf.GGUF) -> np.ndarray:
    shape = parameter.shape[1:] if parameter.stacked else parameter.shape
    return parameter.storage(file.read(parameter.names[layer]), shape)


def _fuse(rows: Sequence[Row], parts: Sequence[np.ndarray]) -> np.ndarray:
    """Converts parameters to the tensor that stores them: the inverse of `Row.storage`."""
    matrices = []
    for row, part in zip(rows, parts, strict=True):
        inputs = row.storage.inputs if isinstance(row.storage, Matrix) else 0
        matrices.append(part.reshape(math.prod(part.shape[:inputs]), -1))
    fused = np.concatenate(matrices, axis=1)
    if isinstance(rows[0].storage, Vector):
        return fused[0]
    return fused.T if rows[0].storage.transposed else fused


def _write_weights(output: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes one file, or several of about `_SHARD` bytes and their index."""
    names: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        # Files are renamed when their number is known.
        safetensors.numpy.save_file(shard, output / f"{len(names)}.safetensors", {"format": "pt"})
        names.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(x.nbytes for x in shard.values()) + tensor.nbytes > _SHARD:
            flush()
        shard[name] = np.ascontiguousarray(tensor)
        total += tensor.nbytes
    flush()
    if len(names) == 1:
        (output / "0.safetensors").rename(output / "model.safetensors")
        return
    files = [f"model-{n:05}-of-{len(names):05}.safetensors" for n in range(1, len(names) + 1)]
    for number, file in enumerate(files):
        (output / f"{number}.safetensors").rename(output / file)
    weight_map = {
        name: file for file, shard_names in zip(files, names, strict=True) for name in shard_names
    }
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(output / "model.safetensors.index.json", index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
