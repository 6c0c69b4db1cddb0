"""The keys and values of a text, computed by the frozen model chunk by chunk."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax.backbones.backbone import Backbone, as_slots
from prefix_jax.backbones.cache import Cache
from prefix_jax.backbones.stacking import Params, as_stacked
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import KVPrefix, Prefix, Site

# Tokens per chunk: attention needs memory for a chunk times the text, not for the text squared.
_CHUNK = 512


def text_prefix(backbone: Backbone, params: Params, ids: Sequence[int]) -> Prefix:
    """Returns the keys and values of a text as a prefix, in float32.

    Followed by a prompt, it equals the text prepended to the prompt, except that a sliding window
    counts it as any other prefix.

    Args:
        backbone: a decoder.
        params: its weights.
        ids: the tokens of the text.

    Raises:
        BackboneError: the model is not a decoder.
        ContextError: the text is longer than the learned positions.
    """
    P = len(ids)
    backbone.stack.check_length(P)
    columns = -(-P // _CHUNK) * _CHUNK if P > _CHUNK else P
    chunk = min(_CHUNK, columns)
    cache = backbone.empty_cache(params, 1, columns)
    padded = np.zeros(columns, np.int32)
    padded[:P] = ids
    for start in range(0, columns, chunk):
        ids_1T = padded[None, start : start + chunk]
        cache = _read_chunk(backbone, params, ids_1T, np.int32(start), np.int32(P), cache)
    k_LPKH, v_LPKH = as_slots(as_stacked(cache.layers))
    inside = KVPrefix(*(x[:, :P].astype(jnp.float32) for x in (k_LPKH, v_LPKH)))
    return Prefix(decoder=Site(inside), text_position=P)


@functools.partial(jax.jit, static_argnames="backbone")
def _read_chunk(
    backbone: Backbone,
    params: Params,
    ids_1T: jax.Array,
    start: jax.Array,
    length: jax.Array,
    cache: Cache,
) -> Cache:
    """Appends a chunk that starts at a position; tokens from `length` on are padding."""
    position_1T = start + jnp.arange(ids_1T.shape[1])[None]
    layout = TokenLayout((position_1T < length).astype(jnp.int32), None, position_1T)
    return backbone.hidden(params, ids_1T, layout, None, cache)[1]
