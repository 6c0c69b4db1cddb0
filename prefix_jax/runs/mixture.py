"""Mixtures: assigning records to datasets and saving the shared factors of their prefixes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.numpy

from prefix_jax.config import DataConfig
from prefix_jax.data.mixture import assign_datasets, collect_datasets
from prefix_jax.data.source import Record
from prefix_jax.errors import CheckpointError, ConfigError
from prefix_jax.methods import Method, MultitaskPromptTuning
from prefix_jax.methods.base import Params
from prefix_jax.methods.multitask import PARTS, to_parts


def split_mixture(
    data: DataConfig, method: Method[Any] | None, sources: Mapping[str, Sequence[Record]]
) -> tuple[Method[Any] | None, Mapping[str, Sequence[Record]]]:
    """Returns the method with the names of its datasets, and the records of each split with theirs.

    Without `data.dataset`, both are returned unchanged.

    Raises:
        ConfigError: the method trains one prefix only, or a dataset has no training example.
        DataError: a record names no dataset, or an unknown one.
    """
    if data.dataset is None:
        if method is not None and method.dataset_names:
            raise ConfigError(
                "method.datasets names several datasets; set data.dataset to the field that names "
                "the dataset of a record"
            )
        return method, sources
    if not isinstance(method, MultitaskPromptTuning):
        raise ConfigError(
            "data.dataset trains one prefix per dataset, which only method.name: multitask "
            "supports; remove it to train one prefix for all"
        )
    names = collect_datasets(sources["train"], data.dataset)
    method = dataclasses.replace(method, datasets=method.datasets or names)
    if idle := [name for name in method.dataset_names if name not in names]:
        raise ConfigError(
            f"no training example belongs to the dataset {idle[0]!r} of method.datasets; the "
            f"datasets in field {data.dataset!r} are {', '.join(names)}"
        )
    splits = {
        name: assign_datasets(records, data.dataset, method.dataset_names)
        for name, records in sources.items()
    }
    return method, splits


def save_factors(directory: Path, params: Params) -> None:
    """Writes the shared and the low-rank factors of the prefixes, from which another run can start.

    Args:
        directory: the run directory.
        params: the method's parameters.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = directory / PARTS
    try:
        path.write_bytes(safetensors.numpy.save(to_parts(params)))
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
