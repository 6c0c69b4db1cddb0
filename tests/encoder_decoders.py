"""Small random encoder-decoders of every kind, compiled once for tests, and prefixes for them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from decoders import V
from decoders import weights as any_weights

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.families import bart, t5
from prefix_jax.backbones.stacking import Params
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import SITES, KVPrefix, Prefix, Site, SiteName

# The stacks have different depths, and the head dimension is not D / N.
_CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "t5": (
        t5,
        {
            "model_type": "t5",
            "vocab_size": V,
            "d_model": 32,
            "d_kv": 10,
            "d_ff": 48,
            "num_layers": 3,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "pad_token_id": 0,
        },
    ),
    "bart": (
        bart,
        {
            "model_type": "bart",
            "vocab_size": V,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 32,
            "eos_token_id": 2,
        },
    ),
}
NAMES = tuple(_CONFIGS)


@functools.cache
def encoder_decoder(name: str) -> Backbone:
    """An encoder-decoder of 2 and 3 layers, D = 32 and V = 50."""
    family, config = _CONFIGS[name]
    return Backbone(family.architecture(config))


def weights(backbone: Backbone) -> Params:
    """Random weights, stacked. A new copy each time."""
    params = any_weights(backbone)
    if backbone.arch.attention_scale is None:
        return params
    # T5's query weights include the scale of the logits.
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * x.shape[-1] ** -0.5 if "q_DNH" in str(path[-1]) else x, params
    )


@functools.cache
def params_of(name: str) -> Params:
    """Random stacked weights."""
    return weights(encoder_decoder(name))


@functools.partial(jax.jit, static_argnums=0)
def states(
    backbone: Backbone,
    params: Params,
    source_BS: jax.Array,
    source: TokenLayout,
    ids_BT: jax.Array,
    target: TokenLayout,
    prefix: Prefix | None,
) -> jax.Array:
    """The decoder's last hidden states, h_BTD, for targets and their sources."""
    encoded = backbone.encode(params, source_BS, source, prefix)
    return backbone.hidden(params, ids_BT, target, prefix, encoded=encoded)[0]


encode = jax.jit(Backbone.encode, static_argnums=0)


def random_prefix(
    name: str, length: int, text_position: int, sites: Iterable[SiteName] = SITES
) -> Prefix:
    """Random keys and values at the given sites."""
    prefix: dict[SiteName, Site] = {}
    for number, (site, shape) in enumerate(encoder_decoder(name).geometry.sites.items()):
        size = (2, shape.layers, length, shape.kv_heads, shape.head_dim)
        k_LPKH, v_LPKH = jax.random.normal(jax.random.key(number), size)
        if site in sites:
            prefix[site] = Site(KVPrefix(k_LPKH, v_LPKH))
    return Prefix.of(prefix, text_position=text_position)


def biased(name: str, site: SiteName, kept: Site, bias: float) -> Site:
    """The same slots with a bias; minus infinity masks them."""
    shape = encoder_decoder(name).geometry.sites[site]
    assert kept.inside is not None
    size = (shape.layers, kept.inside.length, shape.query_heads)
    return Site(kept.inside.replace(bias_LPN=jnp.full(size, bias)))
