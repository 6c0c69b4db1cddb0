"""The compiled programs of the engine.

    empty, resize, add_outside    make the cache, and change its size
    start     copies a prefix into a row
    resize_tables, start_table    the same for n-gram tables
    encode    reads the prompt of a row with an encoder, if there is one
    extend    reads a chunk of the prompts of some rows
    decode    generates tokens in all rows

Only the cache stays on the device between them. Everything else about the rows is a small array on
the host, an argument of every call: a new request, setting or prefix changes values, not shapes.
Programs are compiled per number of columns, `extend` also per number of rows and chunk size,
`start` per prefix length, and `encode` per length of prefix and prompt; all of these are rounded to
a few sizes. `decode` is also compiled per combination of lengths of the shared prefixes in use, and
`extend`, whose rows have the same one, per length.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from prefix_jax.backbones.attention_inputs import rotary_angles
from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.layer import Layer
from prefix_jax.backbones.stacking import Params
from prefix_jax.engine.cache import Layout, RowCache, RowLayer, RowSite, put_rows, take_rows
from prefix_jax.engine.drafts import Tables, expected_tokens, propose, update_acceptance
from prefix_jax.engine.sampling import Settings, choose, top_logprobs
from prefix_jax.engine.warm import Warm, WarmSite
from prefix_jax.mesh import constrain_tokens
from prefix_jax.nn.attention.dense import MASKED
from prefix_jax.nn.attention.mask import MaskAndBias, TokenLayout
from prefix_jax.nn.layers import AttentionInputs
from prefix_jax.prefix import Geometry, SharedSlots, Site

# The slots of shared prefixes: of each prefix, of each layer.
Shared = tuple[tuple[SharedSlots, ...], ...]

# Positions whose logits exist at once; it divides the smallest chunk.
_SCORE_BLOCK = 32


@functools.partial(jax.jit, static_argnames=("geometry", "rows", "width", "dtype"))
def empty(geometry: Geometry, rows: int, width: int, dtype: Any) -> RowCache:
    """Makes the cache of a model with this geometry; see `RowCache.empty`."""
    return RowCache.empty(geometry, rows, width, dtype).constrained()


@functools.partial(jax.jit, static_argnames=("width", "cross_width"))
def resize(cache: RowCache, *, width: int, cross_width: int) -> RowCache:
    """Changes the numbers of columns."""
    return cache.resize(width, cross_width).constrained()


@functools.partial(jax.jit, donate_argnames="cache")
def add_outside(cache: RowCache, warm: Warm) -> RowCache:
    """Makes room for terms outside the softmax. Donates `cache`."""
    return cache.with_outside(warm).constrained()


@functools.partial(jax.jit, donate_argnames="cache")
def start(
    cache: RowCache,
    row: jax.Array,
    warm: WarmSite | None,
    slots: tuple[SharedSlots, ...] | None = None,
) -> RowCache:
    """Empties a row of self-attention and copies a prefix into it. Donates `cache`.

    Args:
        cache: the cache of all rows.
        row: the row.
        warm: what to copy; None for nothing.
        slots: the slots to copy in every layer, if they could be shared but are not.
    """
    layers = []
    for index, layer in enumerate(cache.layers):
        site = WarmSite() if warm is None else warm.layer(index)
        if slots is not None:
            of_layer = slots[index]
            site = dataclasses.replace(
                site, k_LKPH=of_layer.k_KPH, v_LKPH=of_layer.v_KPH, bias_LNP=of_layer.bias_NP
            )
        layers.append(dataclasses.replace(layer, own=layer.own.start(row, site)))
    return RowCache(tuple(layers)).constrained()


@functools.partial(jax.jit, static_argnames=("rows", "buckets", "ways"))
def resize_tables(tables: Tables | None, *, rows: int, buckets: int, ways: int) -> Tables:
    """Makes n-gram tables, or room for larger ones."""
    return Tables.empty(rows, buckets, ways) if tables is None else tables.resize(buckets)


@functools.partial(jax.jit, donate_argnames="tables")
def start_table(tables: Tables, row: jax.Array, entry_G2W: jax.Array | None) -> Tables:
    """Replaces the n-gram table of a row. Donates `tables`."""
    return tables.start(row, entry_G2W)


@functools.partial(jax.jit, static_argnames="backbone", donate_argnames="cache")
def encode(
    backbone: Backbone,
    params: Params,
    cache: RowCache,
    row: jax.Array,
    warm: Warm | None,
    ids_1E: jax.Array,
    count: jax.Array,
) -> RowCache:
    """Runs the encoder of an encoder-decoder on the prompt of a row. Donates `cache`.

    The prefix at the encoder is a warm cache, too. What the row keeps are the keys and values of
    cross-attention: the slots of its prefix, then the encoder's soft tokens and tokens.

    Args:
        backbone: the model without its weights.
        params: its weights, unstacked.
        cache: the cache of all rows.
        row: the row.
        warm: its prefix.
        ids_1E: the prompt, padded on the right.
        count: the number of its tokens.
    """
    warm = warm or Warm()
    stack, weights = backbone.encoder, params["encoder"]
    arch = stack.arch
    x_1ED = backbone.embed(params, ids_1E, backbone.input_table(params))
    position_E = jnp.arange(ids_1E.shape[1])
    real_E = position_E < count
    if warm.embeds_PD is not None:
        slot_P = jnp.arange(len(warm.embeds_PD))
        x_1ED = jnp.concatenate([warm.embeds_PD[None].astype(x_1ED.dtype), x_1ED], axis=1)
        position_E = jnp.concatenate([slot_P, position_E + warm.soft_tokens])
        real_E = jnp.concatenate([slot_P < warm.soft_tokens, real_E])
    position_1E = jnp.where(real_E, position_E + warm.encoder_position, 0)[None]
    tokens = TokenLayout(real_E[None].astype(jnp.int32), None, position_1E)
    x_1ED = stack.embed_positions(weights, x_1ED, tokens, 0)

    E = x_1ED.shape[1]
    k_LKPH = None if warm.encoder is None else warm.encoder.k_LKPH
    P = 0 if k_LKPH is None else k_LKPH.shape[2]
    bias_1NTS = None
    if arch.relative is not None:
        key_1S = jnp.concatenate([jnp.arange(P)[None], position_1E], axis=1)
        bias_1NTS = arch.relative.bias(weights["relative_RN"], position_1E, key_1S)
    inputs = AttentionInputs(
        MaskAndBias(None, bias_BNTS=bias_1NTS),
        rotary_angles(arch, position_1E, False),
        jnp.full(1, P, jnp.int32),
    )
    text_NE = jnp.broadcast_to(jnp.where(real_E, 0.0, MASKED), (arch.heads, E))
    site = RowSite.empty(arch.geometry.main, 1, P + E, x_1ED.dtype)
    for index, layer in enumerate(weights["layers"]):
        of_layer = None if warm.encoder is None else warm.encoder.layer(index)
        own = site.start(jnp.int32(0), of_layer)
        bias_1NS = own.columns.bias_BNS.at[0, :, P:].set(text_NE.astype(x_1ED.dtype))
        columns = dataclasses.replace(own.columns, bias_BNS=bias_1NS)
        outside = None if of_layer is None else of_layer.outside_row()
        out: Any = Layer(arch).apply(
            {"params": layer}, x_1ED, inputs, Site(outside=outside), columns
        )
        x_1ED = constrain_tokens(out[0])
    h_1ED = stack.final_norm(weights, x_1ED)

    layers = []
    encoded: Any = backbone.cross_keys_values(params, h_1ED, tokens).layers
    for index, cached in enumerate(cache.layers):
        assert cached.cross is not None
        of_layer = WarmSite() if warm.cross is None else warm.cross.layer(index)
        k_KEH, v_KEH = (x[0] for x in (encoded[index].k_BKSH, encoded[index].v_BKSH))
        bias_NE = jnp.broadcast_to(jnp.where(real_E, 0.0, MASKED), (backbone.arch.heads, E))
        if of_layer.k_LKPH is not None:
            k_KEH = jnp.concatenate([of_layer.k_LKPH, k_KEH], axis=1)
            v_KEH = jnp.concatenate([of_layer.v_LKPH, v_KEH], axis=1)
            bias_NE = jnp.concatenate([of_layer.bias_LNP, bias_NE], axis=1)
        of_layer = dataclasses.replace(of_layer, k_LKPH=k_KEH, v_LKPH=v_KEH, bias_LNP=bias_NE)
        layers.append(RowLayer(cached.own, cached.cross.start(row, of_layer, bias=MASKED)))
    return RowCache(tuple(layers)).constrained()


@flax.struct.dataclass
class Scores:
    """The log-probabilities of tokens of prompts.

    Attributes:
        logprob_RC: of each token.
        top_id_RCX, top_logprob_RCX: the most probable tokens in its place.
    """

    logprob_RC: Any
    top_id_RCX: Any
    top_logprob_RCX: Any


@functools.partial(jax.jit, static_argnames=("backbone", "top"), donate_argnames="cache")
def extend(
    backbone: Backbone,
    params: Params,
    cache: RowCache,
    shared: Shared,
    rows_R: jax.Array,
    layout: Layout,
    ids_RC: jax.Array,
    count_R: jax.Array,
    next_RC: jax.Array | None = None,
    *,
    top: int = 0,
) -> tuple[RowCache, Scores | None]:
    """Appends a chunk of its prompt to some rows. Donates `cache`.

    Args:
        backbone: the model without its weights.
        params: its weights, unstacked.
        cache: the cache of all rows.
        shared: the shared prefixes of these rows.
        rows_R: the rows, each once.
        layout: the layout of these rows.
        ids_RC: their chunks, padded on the right. What padding writes is overwritten by the tokens
            that follow, before anything attends to it.
        count_R: the numbers of their tokens.
        next_RC: the token after each token, to score it; None for no scores.
        top: X, the number of most probable tokens to report with the scores.
    """
    real_RC = jnp.arange(ids_RC.shape[1]) < count_R[:, None]
    h_RCD, cache = hidden(backbone, params, cache, shared, rows_R, layout, ids_RC, real_RC)
    scores = None if next_RC is None else _score(backbone, params, h_RCD, next_RC, top)
    return cache.constrained(), scores


def _score(
    backbone: Backbone, params: Params, h_RCD: jax.Array, next_RC: jax.Array, top: int
) -> Scores:
    """Scores the token after every position, a few positions at a time: the logits of a whole
    chunk are larger than its activations."""

    def score(block: tuple[jax.Array, jax.Array]) -> Scores:
        h_ID, next_I = block
        logits_IV = backbone.unembed(params, h_ID[None])[0]
        ids_IX, logprobs_IX = top_logprobs(logits_IV, top)
        logprob_I = jnp.take_along_axis(logits_IV, next_I[:, None], axis=1)[:, 0]
        return Scores(logprob_I - jax.nn.logsumexp(logits_IV, axis=-1), ids_IX, logprobs_IX)

    blocks: Any = (
        h_RCD.reshape(-1, _SCORE_BLOCK, h_RCD.shape[-1]),
        next_RC.reshape(-1, _SCORE_BLOCK),
    )
    scores = jax.lax.map(score, blocks)
    return jax.tree.map(lambda x: x.reshape(*next_RC.shape, *x.shape[2:]), scores)


@flax.struct.dataclass
class Burst:
    """The tokens of several decoding steps.

    Attributes:
        token_BU, logprob_BU: the generated tokens and their log-probabilities.
        count_B: the number of tokens of each row.
        running_B: whether the continuation has not ended.
        invalid_B: whether the model gave NaN or infinite logits, which ends the continuation.
        top_id_BUX, top_logprob_BUX: the most probable tokens in the place of each.
        acceptance_B: the estimated probability that a drafted token is accepted.
        steps: the number of forward passes.
        steps_B: the number of them in which the row was running.
        drafted_B, accepted_B: the numbers of drafted tokens that were verified and accepted.
    """

    token_BU: Any
    logprob_BU: Any
    count_B: Any
    running_B: Any
    invalid_B: Any
    top_id_BUX: Any
    top_logprob_BUX: Any
    acceptance_B: Any
    steps: Any
    steps_B: Any
    drafted_B: Any
    accepted_B: Any


@flax.struct.dataclass
class Choice:
    """The tokens that were chosen in one forward pass, one after each token that it read.

    Attributes:
        token_BT, logprob_BT, invalid_BT: see `choose`.
        top_id_BTX, top_logprob_BTX: the most probable tokens in the place of each.
    """

    token_BT: jax.Array
    logprob_BT: jax.Array
    invalid_BT: jax.Array
    top_id_BTX: jax.Array
    top_logprob_BTX: jax.Array


@functools.partial(
    jax.jit,
    static_argnames=("backbone", "capacity", "top", "num_drafted", "relative_cost"),
    donate_argnames="cache",
)
def decode(
    backbone: Backbone,
    params: Params,
    cache: RowCache,
    shared: Shared,
    layout: Layout,
    settings: Settings,
    ids_BS: jax.Array,
    running_B: jax.Array,
    acceptance_B: jax.Array,
    tables: Tables | None,
    steps: jax.Array,
    stop_early: jax.Array,
    allowed_BW: jax.Array | None,
    *,
    capacity: int,
    top: int,
    num_drafted: int = 0,
    relative_cost: float = 1.0,
) -> tuple[RowCache, Burst]:
    """Generates tokens in every running row, in up to `steps` forward passes. Donates `cache`.

    Every step computes all rows. A row that is not running writes to the columns after its last,
    which nothing reads before they are overwritten; so do drafted tokens that turn out wrong.

    A step with a draft reads the last token of each row and up to K drafted ones, and generates as
    many tokens as it would without them one at a time. It is run if the rows are expected to gain
    more tokens than it costs time; otherwise a step reads one token per row.

    Args:
        backbone: the model without its weights.
        params: its weights, unstacked.
        cache: the cache of all rows.
        shared: the shared prefixes of all rows.
        layout: their layout. The last token of each running row is not in the cache yet.
        settings: their settings.
        ids_BS: their prompts and generated tokens, from column 0.
        running_B: the rows to generate in.
        acceptance_B: the estimated probability that a drafted token is accepted.
        tables: the n-gram tables that drafts are looked up in; None if no row has one.
        steps: the maximum number of steps.
        stop_early: whether to return as soon as a row ends, because a request waits for it.
        allowed_BW: the tokens that guides allow in the first step, as bits of uint32 words; None
            for all. With guides, `steps` is 1 and there are no drafts.
        capacity: the largest value of `steps`.
        top: X, the number of most probable tokens to report.
        num_drafted: K, the maximum number of drafted tokens per row and step.
        relative_cost: the time of a step with a draft, relative to one without.
    """
    B, K = len(running_B), num_drafted
    U = capacity * (K + 1)
    first = jnp.asarray(running_B)
    no_tokens_B = jnp.zeros(B, jnp.int32)
    burst = Burst(
        token_BU=jnp.zeros((B, U), jnp.int32),
        logprob_BU=jnp.zeros((B, U)),
        count_B=no_tokens_B,
        running_B=first,
        invalid_B=jnp.zeros(B, bool),
        top_id_BUX=jnp.zeros((B, U, top), jnp.int32),
        top_logprob_BUX=jnp.zeros((B, U, top)),
        acceptance_B=jnp.asarray(acceptance_B),
        steps=jnp.int32(0),
        steps_B=no_tokens_B,
        drafted_B=no_tokens_B,
        accepted_B=no_tokens_B,
    )
    rows_B1, offset_T = jnp.arange(B)[:, None], jnp.arange(K + 1)

    def unfinished(carry: Any) -> jax.Array:
        _, _, _, burst = carry
        ended = (burst.running_B != first).any() & stop_early
        return (burst.steps < steps) & burst.running_B.any() & ~ended

    def forward(
        cache: RowCache,
        layout: Layout,
        ids_BS: jax.Array,
        draft_BK: jax.Array,
        offered_B: jax.Array,
        running_B: jax.Array,
    ) -> tuple[RowCache, Choice]:
        """Reads the last token and a draft of every row, and chooses the token after each."""
        T = draft_BK.shape[1] + 1
        # Tokens of text in the cache, without the last one.
        text_B = layout.length_B - layout.slots_B
        last_B1 = jnp.take_along_axis(ids_BS, text_B[:, None], axis=1)
        ids_BT = jnp.concatenate([last_B1, draft_BK], axis=1)
        real_BT = running_B[:, None] & (offset_T[:T] <= offered_B[:, None])
        h_BTD, cache = hidden(backbone, params, cache, shared, None, layout, ids_BT, real_BT)
        logits_BTV = backbone.unembed(params, h_BTD)
        ids_BS = ids_BS.at[rows_B1, text_B[:, None] + 1 + offset_T[: T - 1]].set(
            draft_BK, mode="drop"
        )

        def repeat(x: Any) -> jax.Array:
            return jnp.repeat(x, T, axis=0)

        a, V = backbone.arch, logits_BTV.shape[-1]
        chosen = choose(
            logits_BTV.reshape(-1, V),
            repeat(ids_BS),
            (text_B[:, None] + 1 + offset_T[:T]).reshape(-1),
            jax.tree.map(repeat, settings),
            allowed_BW,
            a.first_id,
            a.last_id,
        )
        tops = top_logprobs(logits_BTV.reshape(-1, V), top) if top else ()
        if not top:
            tops = (jnp.zeros((B * T, 0), jnp.int32), jnp.zeros((B * T, 0)))
        choice = Choice(*(x.reshape(B, T, *x.shape[1:]) for x in (*chosen, *tops)))
        # Without a draft, the tokens are padded to those of a step with one.
        more = K + 1 - T
        choice = jax.tree.map(
            lambda x: jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)), choice
        )
        return cache.constrained(), choice

    def body(carry: Any) -> Any:
        cache, layout, ids_BS, burst = carry
        running_B = burst.running_B
        text_B = layout.length_B - layout.slots_B
        # The number of generated tokens, and of those that may follow.
        generated_B = text_B + 1 - settings.prompt_B
        room_B = settings.max_new_B - generated_B
        if K:
            draft_BK, offered_B = propose(tables, ids_BS, text_B + 1, K)
            offered_B = jnp.where(running_B, jnp.minimum(offered_B, room_B - 1), 0)
            gain_B = expected_tokens(burst.acceptance_B, offered_B)
            verify = gain_B.sum() > (relative_cost - 1) * running_B.sum()
            cache, choice = jax.lax.cond(
                verify,
                forward,
                lambda cache, layout, ids_BS, draft_BK, offered_B, running_B: forward(
                    cache, layout, ids_BS, draft_BK[:, :0], jnp.zeros_like(offered_B), running_B
                ),
                cache,
                layout,
                ids_BS,
                draft_BK,
                offered_B,
                running_B,
            )
            # The first drafted token can be judged without having been read.
            judged_B = jnp.where(verify, offered_B, jnp.minimum(offered_B, 1))
            same_BK = (choice.token_BT[:, :K] == draft_BK) & (offset_T[:K] < judged_B[:, None])
            right_B = jnp.cumprod(same_BK, axis=1).sum(axis=1)
            acceptance_B = update_acceptance(
                burst.acceptance_B, right_B, jnp.minimum(right_B + 1, judged_B)
            )
            drafted_B = jnp.where(verify, offered_B, 0)
            accepted_B = jnp.where(verify, right_B, 0)
        else:
            draft_BK = jnp.zeros((B, 0), jnp.int32)
            cache, choice = forward(cache, layout, ids_BS, draft_BK, no_tokens_B, running_B)
            acceptance_B, drafted_B, accepted_B = burst.acceptance_B, no_tokens_B, no_tokens_B

        # Tokens after the first that ends the text do not count.
        ended_BT = (choice.token_BT[:, :, None] == settings.eos_BE[:, None]).any(axis=2)
        ended_BT |= choice.invalid_BT | (offset_T + 1 >= room_B[:, None])
        open_BT = jnp.cumsum(ended_BT, axis=1) - ended_BT == 0
        new_BT = running_B[:, None] & open_BT & (offset_T <= accepted_B[:, None])
        count_B = new_BT.sum(axis=1)

        def append(x_BS: jax.Array, start_B: jax.Array, new: jax.Array) -> jax.Array:
            """Writes the new tokens of each row, or values of theirs, from a column."""
            column_BT = jnp.where(new_BT, start_B[:, None] + offset_T, x_BS.shape[1])
            return x_BS.at[rows_B1, column_BT].set(new, mode="drop")

        burst = Burst(
            token_BU=append(burst.token_BU, burst.count_B, choice.token_BT),
            logprob_BU=append(burst.logprob_BU, burst.count_B, choice.logprob_BT),
            count_B=burst.count_B + count_B,
            running_B=running_B & ~(ended_BT & new_BT).any(axis=1),
            invalid_B=burst.invalid_B | (choice.invalid_BT & new_BT).any(axis=1),
            top_id_BUX=append(burst.top_id_BUX, burst.count_B, choice.top_id_BTX),
            top_logprob_BUX=append(burst.top_logprob_BUX, burst.count_B, choice.top_logprob_BTX),
            acceptance_B=acceptance_B,
            steps=burst.steps + 1,
            steps_B=burst.steps_B + running_B,
            drafted_B=burst.drafted_B + drafted_B,
            accepted_B=burst.accepted_B + jnp.maximum(count_B - 1, 0),
        )
        ids_BS = append(ids_BS, text_B + 1, choice.token_BT)
        layout = dataclasses.replace(layout, length_B=layout.length_B + count_B)
        return cache, layout, ids_BS, burst

    layout, ids_BS = jax.tree.map(jnp.asarray, (layout, ids_BS))
    carry = (cache.constrained(), layout, ids_BS, burst)
    cache, _, _, burst = jax.lax.while_loop(unfinished, body, carry)
    return cache, burst


def hidden(
    backbone: Backbone,
    params: Params,
    cache: RowCache,
    shared: Shared,
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
        shared: the shared prefixes of these rows.
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
    sizes = [layers[0].k_KPH.shape[1] for layers in shared]
    inputs = {
        sliding: layout.inputs(
            arch, params, position_BT, column_BT, cache.width, sizes, sliding=sliding
        )
        for sliding in set(arch.sliding) or {False}
    }
    tokens = TokenLayout(real_BT.astype(jnp.int32), None, position_BT)
    x_BTD = backbone.embed(params, ids_BT)
    x_BTD = constrain_tokens(stack.embed_positions(params, x_BTD, tokens, 0))
    layers = []
    for index, (weights, layer) in enumerate(zip(params["layers"], cache.layers, strict=True)):
        own, cross = take_rows(layer.own, rows_R), layer.cross
        to_encoder: tuple[Any, ...] = ()
        if cross is not None:
            # Its columns are masked by their bias.
            everything = AttentionInputs(MaskAndBias(None))
            to_encoder = (everything, Site(outside=cross.outside), cross.columns)
        out: Any = Layer(arch).apply(
            {"params": weights},
            x_BTD,
            inputs[arch.sliding[index] if arch.sliding else False],
            Site(outside=own.outside, shared=tuple(slots[index] for slots in shared)),
            own.columns,
            *to_encoder,
        )
        x_BTD = constrain_tokens(out[0])
        columns = put_rows(layer.own.columns, rows_R, out[1])
        layers.append(RowLayer(RowSite(columns, layer.own.outside), cross))
    return stack.final_norm(params, x_BTD), RowCache(tuple(layers))
