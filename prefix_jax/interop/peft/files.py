"""Reads and writes the two files of a PEFT adapter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from prefix_jax.artifact.atomic_dir import atomic_replace
from prefix_jax.errors import CheckpointError, PrefixError
from prefix_jax.untrusted.json import read_json_object
from prefix_jax.untrusted.paths import expand
from prefix_jax.untrusted.safetensors import read_tensors
from prefix_jax.validation import Count, require

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_CONFIG_LIMIT = 2**20

# The PEFT version whose files are reproduced byte for byte.
VERSION = "0.21.2"


@dataclasses.dataclass(frozen=True)
class Files:
    """The contents of an adapter.

    Attributes:
        where: its directory, for messages.
        config: the contents of `adapter_config.json`.
        arrays: the arrays of `adapter_model.safetensors`, in float32.
    """

    where: Path
    config: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]

    def number(self, key: str, default: int | None = None) -> int:
        """Returns an integer from the configuration.

        Raises:
            PrefixError: the key is absent and has no default, or its value is not an integer.
        """
        value = self.config.get(key)
        value = default if value is None else value
        where = f"{self.where / CONFIG}: {key}"
        number: int = require(value, Count, where, PrefixError)
        return number

    def array(self, name: str, ndim: int) -> np.ndarray:
        """Returns an array of the adapter.

        Raises:
            PrefixError: the array is absent, has another number of axes, or is not finite.
        """
        file = self.where / WEIGHTS
        x = self.arrays.get(name)
        if x is None:
            held = ", ".join(sorted(self.arrays)) or "nothing"
            raise PrefixError(f"{file} has no {name}, only {held}; save the adapter again")
        if x.ndim != ndim:
            raise PrefixError(f"{file}: {name} must have {ndim} axes, got shape {x.shape}")
        if not np.isfinite(x).all():
            raise PrefixError(
                f"{file}: {name} contains NaN or infinite values; train the adapter again"
            )
        return x


def read(directory: str | Path) -> Files:
    """Reads an adapter.

    Args:
        directory: the output of `PeftModel.save_pretrained`; for an adapter with a name other than
            "default", the subfolder with its name.

    Raises:
        PrefixError: the directory has no adapter, the adapter is damaged, or its weights are a
            pickle.
    """
    path = expand(directory, PrefixError)
    if not expand(path / CONFIG, PrefixError).is_file():
        inner = sorted(file.parent.name for file in path.glob(f"*/{CONFIG}"))
        hint = f"; it has adapters by name: {', '.join(inner)}" if inner else ""
        raise PrefixError(f"{path} is not a PEFT adapter: it has no {CONFIG}{hint}")
    config = read_json_object(path / CONFIG, PrefixError, limit=_CONFIG_LIMIT)
    if not expand(path / WEIGHTS, PrefixError).is_file():
        if (path / _PICKLE).is_file():
            raise PrefixError(
                f"{path} has its weights in {_PICKLE}, a pickle, which is never read because it "
                "can run arbitrary code. Convert it with PEFT where you trust it: "
                "PeftModel.from_pretrained(model, directory).save_pretrained(directory)"
            )
        raise PrefixError(f"{path} has no {WEIGHTS}; copy the adapter again")
    arrays = read_tensors(path / WEIGHTS, PrefixError)
    with np.errstate(over="ignore"):  # `array` reports what becomes infinite
        return Files(path, config, {name: np.asarray(x, np.float32) for name, x in arrays.items()})


def write(output: str | Path, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an adapter, byte for byte like PEFT's `save_pretrained`.

    Args:
        output: the directory, which must be absent or empty.
        config: the contents of `adapter_config.json`.
        arrays: the arrays of `adapter_model.safetensors`.

    Raises:
        PrefixError: the directory is not empty.
        CheckpointError: the adapter could not be written.
    """
    path = expand(output, PrefixError).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise PrefixError(f"{output} exists already; choose another directory, or remove it")
    content = {name: np.array(x, np.float32, order="C") for name, x in arrays.items()}
    try:
        with atomic_replace(path) as new:
            text = json.dumps(config, indent=2, sort_keys=True)
            (new / CONFIG).write_text(text, encoding="utf-8")
            (new / WEIGHTS).write_bytes(safetensors.numpy.save(content, {"format": "pt"}))
    except OSError as error:
        raise CheckpointError(f"cannot write {output}: {error}; choose another place") from error
