"""States of small runs that checkpoints store, and comparisons of their bits."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, SingleDeviceSharding

from prefix_jax.mesh import replicated
from prefix_jax.train.step import TrainState


def content(step: int, length: int = 16, dtype: object = np.float32) -> TrainState:
    """The state of the checkpoint of `step` in these tests, on the host."""
    rng = np.random.default_rng(step)
    arrays = [rng.standard_normal((4, length, 2, 8)).astype(dtype) for _ in range(4)]
    return TrainState(
        step=np.int32(step),
        train={"backbone": {"q_DNH": None}, "prefix": {"k": arrays[0], "v": arrays[1]}},
        optimizer=(optax.EmptyState(), {"mu": arrays[2], "hole": optax.MaskedNode()}, arrays[3]),
    )


def place(sharding: jax.sharding.Sharding, state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(
            leaf.shape, sharding if leaf.ndim else replicated_like(sharding), lambda i: leaf[i]
        ),
        state,
    )


def replicated_like(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    return replicated(sharding.mesh) if isinstance(sharding, NamedSharding) else sharding


def one_device() -> jax.sharding.Sharding:
    return SingleDeviceSharding(jax.devices()[0])


def state_of(step: int, **kwargs: object) -> TrainState:
    return place(one_device(), content(step, **kwargs))


def bits(state: TrainState) -> list[tuple[str, tuple[int, ...], bytes]]:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    return [(leaf.dtype.name, leaf.shape, leaf.tobytes()) for leaf in leaves]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
