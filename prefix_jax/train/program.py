"""The program of a run: its jitted step, and the state that it starts from."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import optax
from jax.sharding import Mesh

from prefix_jax.config import Config
from prefix_jax.mesh import replicated
from prefix_jax.model import Params, PrefixModel
from prefix_jax.train.optimizer import make_optimizer, make_schedule
from prefix_jax.train.partition import labels, split
from prefix_jax.train.step import TrainState, init_state, make_step


class Start(Protocol):
    """Makes the state before the first step: `init_state`, or `abstract_state`."""

    def __call__(
        self, train: Any, frozen: Any, optimizer: optax.GradientTransformation, mesh: Mesh
    ) -> TrainState: ...


@dataclasses.dataclass(frozen=True)
class Program:
    """What a run repeats.

    Attributes:
        schedule: the learning rate by step.
        frozen: the frozen leaves of {"backbone": …, "prefix": …, "head": …}.
        state: before the first step. The first step consumes it.
        step: the jitted training step, see `make_step`.
    """

    schedule: optax.Schedule
    frozen: Any
    state: TrainState
    step: jax.stages.Wrapped


def make_program(
    config: Config,
    model: PrefixModel,
    params: Params,
    steps: int,
    mesh: Mesh,
    start: Start = init_state,
) -> Program:
    """Builds the step of a run.

    Args:
        config: the run.
        model: backbone, method and head.
        params: {"backbone": …, "prefix": …, "head": …} on the mesh. Abstract ones with shardings
            will do to compile the step, with `start=abstract_state`.
        steps: of the whole run.
        mesh: the devices.
        start: makes the state.
    """
    partition = labels(params, full=model.method is None)
    train, frozen = split(params, partition)
    schedule = make_schedule(config.optim, steps)
    head_peak = config.optim.head_learning_rate
    head_schedule = None
    if model.head is not None and head_peak is not None:
        head_schedule = make_schedule(config.optim, steps, head_peak)
    optimizer = make_optimizer(config.optim, schedule, partition, head_schedule)
    state = start(train, frozen, optimizer, mesh)
    step = jax.jit(
        make_step(model, optimizer, reduction=config.data.reduction, seed=config.train.seed),
        donate_argnums=0,
        # What comes out lies where it came from, so that every step runs one program.
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh)),
    )
    return Program(schedule, frozen, state, step)
