"""One step of greedy decoding: one token per row, after a prefix and a text."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prefix_jax.backbones.stacking import Params
from prefix_jax.decode import loop
from prefix_jax.decode.draw import Draw
from prefix_jax.decode.processors import Constraints
from prefix_jax.decode.state import State
from prefix_jax.mesh import BATCH_AXES, HEAD_AXIS, batch_shards, weight_shardings
from prefix_jax.plan.abstract import AbstractRun, everywhere, placed


def lower_step(run: AbstractRun, rows: int, context: int, mesh: Mesh) -> tuple[Any, Params]:
    """Lowers a decoding step. Also returns its abstract {"backbone": …, "prefix": …}, with the
    layers unstacked.

    Args:
        run: the run whose prefix precedes every text.
        rows: B.
        context: tokens per row, prompt and output together; for an encoder-decoder, the encoder's
            tokens, and the maximum number of output tokens.
        mesh: the devices. The cache is split over the batch axes (rows) and tensor (heads).
    """
    backbone, stacked = run.model.backbone, run.params(mesh)
    weights = unstacked(stacked["backbone"])
    if "encoder" in weights:
        weights = {**weights, "encoder": unstacked(weights["encoder"])}
    weights = placed(weights, weight_shardings(weights, mesh))
    prefix = everywhere(jax.eval_shape(run.model.prefix, stacked), mesh)
    end_of_text: Any = jax.ShapeDtypeStruct((1,), jnp.int32)
    search = everywhere(Draw(Constraints(end_of_text), None, None), mesh)
    end = everywhere(jax.ShapeDtypeStruct((), jnp.int32), mesh)

    def read(weights: Params, prefix: Any, search: Draw) -> State:
        two_sided = backbone.arch.encoder is not None
        ids_BS = jnp.zeros((rows, context if two_sided else 1), jnp.int32)
        return loop.prefill(
            backbone,
            weights,
            prefix,
            search,
            ids_BS,
            jnp.ones((rows,), jnp.int32),
            jnp.ones((rows,), bool),
            jnp.int32(context),
            capacity=context - 1,
        )

    shapes = jax.eval_shape(read, weights, prefix, search)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, _spec(leaf.shape, rows, mesh))
        ),
        shapes,
    )
    step = jax.jit(functools.partial(loop.step, backbone), donate_argnums=3)
    with jax.set_mesh(mesh):
        lowered = step.lower(weights, prefix, search, state, end)
    return lowered, {**stacked, "backbone": weights}


def unstacked(params: Params) -> Params:
    """Abstract weights with the layers unstacked, like `to_unstacked`."""
    layers = params["layers"]
    L = jax.tree.leaves(layers)[0].shape[0]
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), layers)
    return {**params, "layers": (one,) * L}


def _spec(shape: tuple[int, ...], rows: int, mesh: Mesh) -> PartitionSpec:
    """Partition of the decoding state: rows come first, then KV heads ([B, K, S, H])."""
    if not shape or shape[0] != rows or rows % batch_shards(mesh):
        return PartitionSpec()
    if len(shape) == 4 and shape[1] % mesh.shape[HEAD_AXIS] == 0:
        return PartitionSpec(BATCH_AXES, HEAD_AXIS)
    return PartitionSpec(BATCH_AXES)
