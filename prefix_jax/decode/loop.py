"""The two compiled programs of decoding: prefill, then token-by-token generation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.stacking import Params
from prefix_jax.decode.beam import Beam
from prefix_jax.decode.draw import Draw
from prefix_jax.decode.state import State
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import Prefix

Search = Draw | Beam


@functools.partial(jax.jit, static_argnames=("backbone", "capacity"))
def prefill(
    backbone: Backbone,
    params: Params,
    prefix: Prefix | None,
    search: Search,
    ids_BS: jax.Array,
    prompt_B: jax.Array,
    real_B: jax.Array,
    end: jax.Array,
    *,
    capacity: int,
) -> State:
    """Prefills the cache with the prompts and chooses the first token of every continuation.

    In an encoder-decoder the encoder reads the prompt, and the decoder starts from the model's
    start token.

    Args:
        backbone: the model without its weights.
        params: the backbone's weights, stacked or unstacked.
        prefix: precedes every prompt.
        search: how tokens are chosen.
        ids_BS: the prompts, padded on the right.
        prompt_B: the lengths of the prompts, at least 1.
        real_B: False for padding rows.
        end: the maximum number of tokens to generate.
        capacity: the number of columns U allocated for new tokens, at least `end`.
    """
    M = search.width
    layout = TokenLayout.plain(jnp.arange(ids_BS.shape[1]) < prompt_B[:, None])
    encoded = None
    if backbone.arch.encoder is not None:
        encoded = backbone.encode(params, ids_BS, layout, prefix)
        assert backbone.arch.start_id is not None  # as every encoder-decoder has one
        ids_BS = jnp.full((len(ids_BS), 1), backbone.arch.start_id, jnp.int32)
        prompt_B = jnp.ones_like(prompt_B)
        layout = TokenLayout.plain(jnp.ones_like(ids_BS, bool))
    B, S = ids_BS.shape
    cache = backbone.empty_cache(params, B, S)
    h_BSD, cache = backbone.hidden(params, ids_BS, layout, prefix, cache, encoded=encoded)
    h_B1D = jnp.take_along_axis(h_BSD, prompt_B[:, None, None] - 1, axis=1)
    logits_B1V = backbone.unembed(params, h_B1D)
    ids_BMW = jnp.pad(jnp.repeat(ids_BS[:, None], M, axis=1), ((0, 0), (0, 0), (0, capacity)))
    state = State(
        cache=cache.grow(M * capacity),
        ids_BMW=ids_BMW,
        prompt_B=prompt_B,
        step=jnp.zeros((), jnp.int32),
        search_state=search.start(ids_BMW, real_B, capacity),
        invalid_B=jnp.zeros_like(real_B),
        encoded=encoded,
    )
    return search.choose(state, jnp.broadcast_to(logits_B1V, (B, M, logits_B1V.shape[2])), end)


@functools.partial(jax.jit, static_argnames="backbone", donate_argnames="state")
def advance(
    backbone: Backbone,
    params: Params,
    prefix: Prefix | None,
    search: Search,
    state: State,
    until: jax.Array,
    end: jax.Array,
) -> State:
    """Generates until step `until`, or until every continuation has ended. Donates `state`."""
    return jax.lax.while_loop(
        lambda state: (state.step < until) & search.running(state),
        lambda state: step(backbone, params, prefix, search, state, end),
        state,
    )


def step(
    backbone: Backbone,
    params: Params,
    prefix: Prefix | None,
    search: Search,
    state: State,
    end: jax.Array,
) -> State:
    """Generates one token for every continuation."""
    B, M, _ = state.ids_BMW.shape
    position_B = state.prompt_B + state.step - 1
    layout = TokenLayout(
        segment_BT=jnp.ones((B, M), jnp.int32),
        branch_BT=jnp.broadcast_to(jnp.arange(1, M + 1), (B, M)),
        position_BT=jnp.broadcast_to(position_B[:, None], (B, M)),
    )
    h_BMD, cache = backbone.hidden(
        params,
        state.last_BM,
        layout,
        prefix,
        state.cache,
        search.lineage(state),
        state.encoded,
    )
    state = dataclasses.replace(state, cache=cache)
    return search.choose(state, backbone.unembed(params, h_BMD), end)
