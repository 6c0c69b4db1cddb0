"""The training step: one jitted function that reads the backbone and moves the prefix."""

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
    """All that a step changes, and all that a checkpoint holds.

    Attributes:
        step: int32, optimizer steps taken.
        train: the trained leaves; None where the tree is frozen.
        optimizer: the optimizer's state, of the trained leaves alone.
    """

    step: jax.Array
    train: Any
    optimizer: optax.OptState


@flax.struct.dataclass
class StepMetrics:
    """What a step reports, float32 scalars if nothing else is said.

    Attributes:
        loss: as it is minimised: nats per target token, or per example under that reduction.
        targets: how many tokens were predicted.
        tokens: how many tokens were read, padding not counted.
        grad_norm: of the trained part, before clipping.
        param_norm: of the trained part, before the update.
        finite: bool, False where loss or gradient was not finite, or the step was told not to go.
            It then changed nothing.
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
    """The state before the first step. The frozen part is only looked at for its shape.

    The trained leaves are copied: steps donate their state, and must not eat what it came from.
    """
    shapes = abstract_state(train, frozen, optimizer, mesh)
    where = jax.tree.map(lambda shape: shape.sharding, shapes.optimizer)
    return TrainState(
        jax.device_put(jnp.zeros((), jnp.int32), shapes.step.sharding),
        jax.tree.map(jnp.copy, train),
        jax.jit(optimizer.init, out_shardings=where)(merge(train, frozen)),
    )


def abstract_state(
    train: Any, frozen: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The shapes of that state, and where they lie; all leaves may be abstract themselves."""
    whole = merge(train, frozen)
    made = jax.eval_shape(optimizer.init, whole)
    # Moments lie where their parameters lie; counters and the like are on every device.
    shardings = optax.tree_map_params(
        optimizer,
        lambda moment, leaf: moment if isinstance(moment, optax.MaskedNode) else leaf.sharding,
        made,
        whole,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )

    def placed(leaf: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return TrainState(
        placed(jax.ShapeDtypeStruct((), jnp.int32), replicated(mesh)),
        jax.tree.map(lambda leaf: placed(leaf, leaf.sharding), train),
        jax.tree.map(placed, made, shardings),
    )


def make_step(
    model: PrefixModel,
    optimizer: optax.GradientTransformation,
    *,
    reduction: Literal["token", "example"] = "token",
    seed: int = 0,
) -> Step:
    """Builds (state, frozen, micro, proceed=True) → (state, metrics), to jit with `state` donated.

    `micro` is a batch whose leaves have a leading axis of micro-batches. Their summed losses and
    gradients are added up and divided once, by all targets (or examples), so that the result does
    not depend on how a step is split.

    With `proceed` False a step changes nothing. A loop can therefore start the next step before it
    has read `finite` of the current one, pass it as `proceed`, and still stop in the state before
    the failure.

    Args:
        model: backbone and method.
        optimizer: of the whole tree, see `make_optimizer`.
        reduction: mean per target "token", or sum per "example" averaged over examples.
        seed: of dropout.
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

        # The transform sees the whole tree, with zeros where it is frozen. Its zero updates of
        # the backbone are never applied, so XLA drops them.
        whole = merge(grads, jax.tree.map(jnp.zeros_like, frozen))
        updates, optimizer_state = optimizer.update(
            whole, state.optimizer, merge(state.train, frozen)
        )
        updates = jax.tree.map(
            lambda leaf, update: None if leaf is None else update,
            state.train,
            updates,
            is_leaf=lambda leaf: leaf is None,
        )
        finite = proceed & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        moved = TrainState(
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
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state), metrics

    return step
