"""The compiled programs of the engine.

    empty, resize, add_outside    make the cache, and change its size
    start     copies a prefix into a row
    extend    reads a chunk of the prompts of some rows
    decode    generates tokens in all rows

Only the cache stays on the device between them. Everything else about the rows is a small array on
the host, an argument of every call: a new request, setting or prefix changes values, not shapes.
Programs are compiled per number of columns, `extend` also per number of rows and chunk size, and
`start` per prefix length; all of these are rounded to a few sizes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.layer import Layer
from prefix_jax.backbones.stacking import Params
from prefix_jax.engine.cache import Layout, RowCache, RowLayer, put_rows, take_rows
from prefix_jax.engine.sampling import Settings, choose
from prefix_jax.engine.warm import Warm
from prefix_jax.mesh import constrain_tokens
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import Site, SiteShape


@functools.partial(jax.jit, static_argnames=("shape", "rows", "width", "dtype"))
def empty(shape: SiteShape, rows: int, width: int, dtype: Any) -> RowCache:
    """Makes the cache of a decoder with this shape; see `RowCache.empty`."""
    return RowCache.empty(shape, rows, width, dtype).constrained()


@functools.partial(jax.jit, donate_argnames="cache")
def start(cache: RowCache, row: jax.Array, warm: Warm | None) -> RowCache:
    """Empties a row and copies a prefix into it. Donates `cache`."""
    return cache.start(row, warm).constrained()


@functools.partial(jax.jit, static_argnames="width")
def resize(cache: RowCache, *, width: int) -> RowCache:
    """Changes the number of columns."""
    return cache.resize(width).constrained()


@functools.partial(jax.jit, donate_argnames="cache")
def add_outside(cache: RowCache, warm: Warm) -> RowCache:
    """Makes room for terms outside the softmax. Donates `cache`."""
    return cache.with_outside(warm).constrained()


@functools.partial(jax.jit, static_argnames="backbone", donate_argnames="cache")
def extend(
    backbone: Backbone,
    params: Params,
    cache: RowCache,
    rows_R: jax.Array,
    layout: Layout,
    ids_RC: jax.Array,
    count_R: jax.Array,
) -> RowCache:
    """Appends a chunk of its prompt to some rows. Donates `cache`.

    Args:
        backbone: the model without its weights.
        params: its weights, unstacked.
        cache: the cache of all rows.
        rows_R: the rows, each once.
        layout: the layout of these rows.
        ids_RC: their chunks, padded on the right. What padding writes is overwritten by the tokens
            that follow, before anything attends to it.
        count_R: the numbers of their tokens.
    """
    real_RC = jnp.arange(ids_RC.shape[1]) < count_R[:, None]
    _, cache = hidden(backbone, params, cache, rows_R, layout, ids_RC, real_RC)
    return cache.constrained()


@flax.struct.dataclass
class Burst:
    """The tokens of several decoding steps.

    Attributes:
        token_BU, logprob_BU: the generated tokens and their log-probabilities.
        count_B: the number of tokens of each row.
        running_B: whether the continuation has not ended.
        invalid_B: whether the model gave NaN or infinite logits, which ends the continuation.
    """

    token_BU: Any
    logprob_BU: Any
    count_B: Any
    running_B: Any
    invalid_B: Any


@functools.partial(jax.jit, static_argnames=("backbone", "capacity"), donate_argnames="cache")
def decode(
    backbone: Backbone,
    params: Params,
    cache: RowCache,
    layout: Layout,
    settings: Settings,
    ids_BS: jax.Array,
    running_B: jax.Array,
    steps: jax.Array,
    stop_early: jax.Array,
    *,
    capacity: int,
) -> tuple[RowCache, Burst]:
    """Generates up to `steps` tokens in every running row. Donates `cache`.

    Every step computes all rows. A row that is not running writes to the column after its last,
    which nothing reads before it is overwritten.

    Args:
        backbone: the model without its weights.
        params: its weights, unstacked.
        cache: the cache of all rows.
        layout: their layout. The last token of each running row is not in the cache yet.
        settings: their settings.
        ids_BS: their prompts and generated tokens, from column 0.
        running_B: the rows to generate in.
        steps: the maximum number of tokens per row.
        stop_early: whether to return as soon as a row ends, because a request waits for it.
        capacity: U, the largest value of `steps`.
    """
    B = len(running_B)
    first = jnp.asarray(running_B)
    burst = Burst(
        token_BU=jnp.zeros((B, capacity), jnp.int32),
        logprob_BU=jnp.zeros((B, capacity)),
        count_B=jnp.zeros(B, jnp.int32),
        running_B=first,
        invalid_B=jnp.zeros(B, bool),
    )

    def unfinished(carry: Any) -> jax.Array:
        step, _, _, _, burst = carry
        ended = (burst.running_B != first).any() & stop_early
        return (step < steps) & burst.running_B.any() & ~ended

    def body(carry: Any) -> Any:
        step, cache, layout, ids_BS, burst = carry
        running_B = burst.running_B
        # Tokens of text in the cache, without the last one.
        text_B = layout.length_B - layout.slots_B
        last_B1 = jnp.take_along_axis(ids_BS, text_B[:, None], axis=1)
        h_B1D, cache = hidden(backbone, params, cache, None, layout, last_B1, running_B[:, None])
        logits_BV = backbone.unembed(params, h_B1D)[:, 0]
        a = backbone.arch
        token_B, logprob_B, invalid_B = choose(
            logits_BV, ids_BS, text_B + 1, settings, a.first_id, a.last_id
        )
        here_BS = jnp.arange(ids_BS.shape[1]) == (text_B + 1)[:, None]
        ids_BS = jnp.where(here_BS & running_B[:, None], token_B[:, None], ids_BS)
        ended_B = (token_B[:, None] == settings.eos_BE).any(axis=1) | invalid_B
        ended_B |= text_B + 2 - settings.prompt_B >= settings.max_new_B
        burst = Burst(
            token_BU=burst.token_BU.at[:, step].set(token_B),
            logprob_BU=burst.logprob_BU.at[:, step].set(logprob_B),
            count_B=burst.count_B + running_B,
            running_B=running_B & ~ended_B,
            invalid_B=burst.invalid_B | (invalid_B & running_B),
        )
        layout = dataclasses.replace(layout, length_B=layout.length_B + running_B)
        return step + 1, cache.constrained(), layout, ids_BS, burst

    layout, ids_BS = jax.tree.map(jnp.asarray, (layout, ids_BS))
    carry = (jnp.int32(0), cache.constrained(), layout, ids_BS, burst)
    _, cache, _, _, burst = jax.lax.while_loop(unfinished, body, carry)
    return cache, burst


def hidden(
    backbone: Backbone,
    params: Params,
    cache: RowCache,
    rows_R: jax.Array | None,
    layout: Layout,
    ids_BT: jax.Array,
    real_BT: jax.Array,
) -> tuple[jax.Array, RowCache]:
    """Like `Backbone.hidden`, with rows of different lengths and prefixes.

    Args:
        backbone: the model without its weights.
        params: its weights, unstacked.
        cache: the cache of all rows.
        rows_R: the rows with new tokens; None for all.
        layout: the layout of these rows.
        ids_BT: the tokens.
        real_BT: False at padding.

    Returns:
        h_BTD after the final norm, and the cache with these tokens.
    """
    arch, stack = backbone.arch, backbone.stack
    column_BT = layout.length_B[:, None] + jnp.arange(ids_BT.shape[1])
    # Padding may be beyond the learned positions, which would give NaN.
    position_BT = jnp.where(real_BT, layout.position(column_BT), 0)
    inputs = {
        sliding: layout.inputs(arch, params, position_BT, column_BT, cache.width, sliding=sliding)
        for sliding in set(arch.sliding) or {False}
    }
    tokens = TokenLayout(real_BT.astype(jnp.int32), None, position_BT)
    x_BTD = backbone.embed(params, ids_BT)
    x_BTD = constrain_tokens(stack.embed_positions(params, x_BTD, tokens, 0))
    layers = []
    for index, (weights, layer) in enumerate(zip(params["layers"], cache.layers, strict=True)):
        own = take_rows(layer, rows_R)
        out: Any = Layer(arch).apply(
            {"params": weights},
            x_BTD,
            inputs[arch.sliding[index] if arch.sliding else False],
            Site(outside=own.outside),
            own.columns,
        )
        x_BTD = constrain_tokens(out[0])
        layers.append(RowLayer(put_rows(layer.columns, rows_R, out[1]), layer.outside))
    return stack.final_norm(params, x_BTD), RowCache(tuple(layers))
