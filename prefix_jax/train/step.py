"""The training step: a pure function that updates the prefix and only reads the backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from prefix_jax.data.batch import Batch
from prefix_jax.mesh import replicated
from prefix_jax.model import PrefixModel
from prefix_jax.train.partition import merge


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes and a checkpoint stores.

    Attributes:
        step: int32, optimizer steps taken.
        train: the trained leaves, with None in place of frozen ones.
        optimizer: the optimizer state of the trained leaves.
    """

    step: jax.Array
    train: Any
    optimizer: optax.OptState


@flax.struct.dataclass
class StepMetrics:
    """Metrics of one step, float32 scalars unless noted.

    Attributes:
        loss: the minimized loss, in nats per target token or per example (see `reduction`).
        targets: the number of predicted tokens.
        tokens: the number of input tokens without padding.
        grad_norm: global norm of the gradients, before clipping.
        param_norm: global norm of the trained parameters, before the update.
        finite: bool; False if the loss or the gradient is not finite, or `proceed` was False. The
            step then changed nothing.
    """

    loss: jax.Array
    targets: jax.Array
    tokens: jax.Array
    grad_norm: jax.Array
    param_norm: jax.Array
    finite: jax.Array


Step = Callable[..., tuple[TrainState, StepMetrics]]


def init_state(
    train: Any, frozen: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Makes the state before the first step. Of frozen leaves, only the shapes are used.

    Trained leaves are copied, because the first step consumes its state.
    """
    shapes = abstract_state(train, frozen, optimizer, mesh)
    shardings = jax.tree.map(lambda shape: shape.sharding, shapes.optimizer)
    return TrainState(
        jax.device_put(jnp.zeros((), jnp.int32), shapes.step.sharding),
        jax.tree.map(jnp.copy, train),
        jax.jit(optimizer.init, out_shardings=shardings)(merge(train, frozen)),
    )


def abstract_state(
    train: Any, frozen: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns the shapes and shardings of that state. The given leaves may be abstract, too."""
    params = merge(train, frozen)
    shapes = jax.eval_shape(optimizer.init, params)
    # Moments are sharded like their parameters; counters are replicated.
    shardings = optax.tree_map_params(
        optimizer,
        lambda moment, leaf: moment if isinstance(moment, optax.MaskedNode) else leaf.sharding,
        shapes,
        params,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )

    def placed(leaf: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return TrainState(
        placed(jax.ShapeDtypeStruct((), jnp.int32), replicated(mesh)),
        jax.tree.map(lambda leaf: placed(leaf, leaf.sharding), train),
        jax.tree.map(placed, shapes, shardings),
    )


def make_step(
    model: PrefixModel,
    optimizer: optax.GradientTransformation,
    *,
    reduction: Literal["token", "example"] = "token",
    seed: int = 0,
) -> Step:
    """Builds (state, frozen, micro, proceed=True) → (state, metrics), to jit with `state` donated.

    `micro` is a batch whose leaves have a leading axis of micro-batches. Their losses and gradients
    are summed and divided once, by the total number of targets (or examples), so that the result
    does not depend on the number of micro-batches.

    With `proceed` False a step changes nothing. A loop can therefore start the next step before it
    has read `finite` of the current one, pass it as `proceed`, and still stop in the state before
    the failure.

    Args:
        model: backbone, method and head.
        optimizer: the optimizer of the whole tree, see `make_optimizer`.
        reduction: "token" is the mean over target tokens; "example" sums over the targets of an
            example and averages over examples.
        seed: the seed of dropout.
    """
    dropout = (model.method is not None and model.method.draws) or (
        model.head is not None and model.head.dropout > 0
    )

    def micro_loss(train: Any, frozen: Any, batch: Batch, rng: jax.Array | None) -> jax.Array:
        return model.loss(merge(train, frozen), batch, rng)

    def summed(state: TrainState, frozen: Any, micro: Batch) -> tuple[jax.Array, Any]:
        value_and_grad = jax.value_and_grad(micro_loss)
        step_rng = jax.random.fold_in(jax.random.key(seed), state.step)
        count = micro.ids_BT.shape[0]
        rngs = jax.random.split(step_rng, count) if dropout else None

        def pick(index: int) -> tuple[Batch, jax.Array | None]:
            return jax.tree.map(lambda leaf: leaf[index], (micro, rngs))

        if count == 1:
            batch, rng = pick(0)
            return value_and_grad(state.train, frozen, batch, rng)

        def add(total: Any, part: tuple[Batch, jax.Array | None]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(state.train, frozen, *part)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.train))
        return jax.lax.scan(add, zero, (micro, rngs))[0]

    def step(
        state: TrainState, frozen: Any, micro: Batch, proceed: bool | jax.Array = True
    ) -> tuple[TrainState, StepMetrics]:
        loss, grads = summed(state, frozen, micro)
        targets = micro.weight_BM.sum()
        count = targets if reduction == "token" else micro.examples.sum()
        loss, grads = loss / count, jax.tree.map(lambda leaf: leaf / count, grads)
        grad_norm = optax.tree.norm(grads)

        # The optimizer receives the whole tree, with zero gradients for frozen leaves. Its zero
        # updates of the backbone are never applied, so XLA removes them.
        all_grads = merge(grads, jax.tree.map(jnp.zeros_like, frozen))
        updates, optimizer_state = optimizer.update(
            all_grads, state.optimizer, merge(state.train, frozen)
        )
        updates = jax.tree.map(
            lambda leaf, update: None if leaf is None else update,
            state.train,
            updates,
            is_leaf=lambda leaf: leaf is None,
        )
        finite = proceed & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updated = TrainState(
            state.step + 1, optax.apply_updates(state.train, updates), optimizer_state
        )
        metrics = StepMetrics(
            loss=loss,
            targets=targets,
            tokens=micro.read.astype(jnp.float32),
            grad_norm=grad_norm,
            param_norm=optax.tree.norm(state.train),
            finite=finite,
        )
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state), metrics

    return step
