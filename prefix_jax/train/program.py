"""Builds what a run repeats: the jitted step, its initial state and the learning-rate schedule."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol

import jax
import optax
from jax.sharding import Mesh

from prefix_jax.config import OptimConfig
from prefix_jax.mesh import replicated
from prefix_jax.model import Params, PrefixModel
from prefix_jax.train.optimizer import make_optimizer, make_schedule
from prefix_jax.train.partition import labels, merge, split
from prefix_jax.train.step import TrainState, init_state, make_step


class InitState(Protocol):
    """Makes the state before the first step: `init_state` or `abstract_state`."""

    def __call__(
        self, train: Any, frozen: Any, optimizer: optax.GradientTransformation, mesh: Mesh
    ) -> TrainState: ...


@dataclasses.dataclass(frozen=True)
class Program:
    """A training step with everything that it needs but the batches.

    Attributes:
        step: the jitted step, see `make_step`.
        state: the state before the first step, which consumes it.
        frozen: the frozen leaves of {"backbone": …, "prefix": …, "head": …}.
        schedule: the learning rate as a function of the step.
        steps: optimizer steps of the whole run.
    """

    step: jax.stages.Wrapped
    state: TrainState
    frozen: Any
    schedule: optax.Schedule
    steps: int

    def params(self, state: TrainState) -> Params:
        """The whole tree, {"backbone": …, "prefix": …, "head": …}, at a state."""
        return merge(state.train, self.frozen)


def make_program(
    model: PrefixModel,
    params: Params,
    optim: OptimConfig,
    *,
    steps: int,
    mesh: Mesh,
    reduction: Literal["token", "example"] = "token",
    seed: int = 0,
    init: InitState = init_state,
) -> Program:
    """Builds the jitted step and its initial state.

    Args:
        model: backbone, method and head.
        params: {"backbone": …, "prefix": …, "head": …} on the mesh. To only compile the step,
            abstract arrays with shardings are enough; then pass `init=abstract_state`.
        optim: optimizer and schedule.
        steps: optimizer steps of the whole run.
        mesh: the devices.
        reduction: of the loss, see `make_step`.
        seed: the seed of dropout.
        init: makes the initial state.
    """
    partition = labels(params, full=model.method is None)
    train, frozen = split(params, partition)
    schedule = make_schedule(optim, steps)
    head_schedule = None
    if model.head is not None and optim.head_learning_rate is not None:
        head_schedule = make_schedule(optim, steps, optim.head_learning_rate)
    optimizer = make_optimizer(optim, schedule, partition, head_schedule)
    state = init(train, frozen, optimizer, mesh)
    step = jax.jit(
        make_step(model, optimizer, reduction=reduction, seed=seed),
        donate_argnums=0,
        # The same shardings as the input, so that every step runs the same executable.
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh)),
    )
    return Program(step, state, frozen, schedule, steps)
