"""Texts beyond the learned positions are errors or NaN, never wrong positions."""

from __future__ import annotations

import functools
from typing import Any

import decoders
import encoder_decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.families import bert
from prefix_jax.errors import ContextError
from prefix_jax.model import start_from_ids
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import Embeds, KVPrefix, Prefix, Site

P = 3


@functools.cache
def backbone_of(name: str) -> Backbone:
    if name == "roberta":
        config = {
            "model_type": "roberta",
            "vocab_size": decoders.V,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 34,
            "layer_norm_eps": 1e-5,
            "type_vocab_size": 1,
            "pad_token_id": 1,
        }
        return Backbone(bert.architecture(config))
    return encoder_decoders.encoder_decoder(name) if name == "bart" else decoders.decoder(name)


@functools.cache
def params_of(name: str) -> Any:
    return decoders.weights(backbone_of(name))


def prefix_of(name: str) -> Prefix:
    site = "encoder" if name == "roberta" else "decoder"
    shape = backbone_of(name).geometry.sites[site]
    size = (shape.layers, P, shape.kv_heads, shape.head_dim)
    return Prefix.of({site: Site(KVPrefix(jnp.ones(size), jnp.ones(size)))}, text_position=P)


def read(
    name: str, length: int, prefix: Prefix | None = None, tokens: TokenLayout | None = None
) -> Any:
    """The last hidden states of a text, outside `jax.jit`."""
    backbone, params = backbone_of(name), params_of(name)
    encoded = None
    if name == "bart":
        source = decoders.present(1, 4)
        encoded = backbone.encode(params, jnp.ones((1, 4), jnp.int32), source, prefix)
    ids_BT = jnp.ones((1, length), jnp.int32)
    tokens = decoders.present(1, length) if tokens is None else tokens
    return backbone.hidden(params, ids_BT, tokens, prefix, encoded=encoded)[0]


@pytest.mark.parametrize("name", ["gpt2", "opt", "roberta", "bart"])
def test_text_beyond_the_position_table_is_an_error(name: str) -> None:
    backbone = backbone_of(name)
    stack = "encoder" if name == "roberta" else "decoder"
    most = backbone.arch.max_positions
    assert np.isfinite(read(name, most)).all()
    with pytest.raises(
        ContextError, match=rf"position {most} exceeds the {most} learned .*{stack}"
    ):
        read(name, most + 1)
    assert np.isfinite(read(name, most - P, prefix_of(name))).all()
    with pytest.raises(ContextError, match=f"position {most} exceeds"):
        read(name, most - P + 1, prefix_of(name))


def test_source_beyond_the_encoder_position_table_is_an_error() -> None:
    backbone, params = backbone_of("bart"), params_of("bart")
    with pytest.raises(
        ContextError, match=r"position 32 exceeds the 32 learned .* encoder of bart"
    ):
        backbone.encode(params, jnp.ones((1, 33), jnp.int32), decoders.present(1, 33))


def test_padded_and_packed_rows_may_exceed_the_position_table() -> None:
    most = backbone_of("gpt2").arch.max_positions
    present_BT = jnp.arange(most + 8)[None] < most
    assert np.isfinite(read("gpt2", most + 8, tokens=TokenLayout.plain(present_BT))).all()
    column_BT = jnp.arange(2 * most)[None]
    packed = TokenLayout(1 + column_BT // most, None, column_BT % most)
    assert np.isfinite(read("gpt2", 2 * most, tokens=packed)).all()
    padded = TokenLayout((column_BT < most).astype(jnp.int32), None, column_BT)
    assert np.isfinite(read("gpt2", 2 * most, tokens=padded)[:, :most]).all()


def test_jitted_function_gives_nan_beyond_the_position_table() -> None:
    """Positions are not known during tracing."""
    most = backbone_of("gpt2").arch.max_positions
    args = backbone_of("gpt2"), params_of("gpt2"), jnp.ones((1, most + 1), jnp.int32)
    h_BTD, _ = decoders.hidden(*args, decoders.present(1, most + 1))
    assert np.isnan(h_BTD[:, most]).all()
    h_BTD, _ = decoders.hidden(*args[:2], args[2][:, :most], decoders.present(1, most))
    assert np.isfinite(h_BTD).all()


def test_rotary_positions_are_not_limited() -> None:
    most = backbone_of("llama").arch.max_positions
    assert np.isfinite(read("llama", most + 8)).all()


def test_prefix_cannot_start_from_a_text_beyond_the_position_table() -> None:
    backbone, params = backbone_of("gpt2"), params_of("gpt2")
    most = backbone.arch.max_positions
    for kind in (Prefix, Embeds):
        with pytest.raises(ContextError, match=f"position {most} exceeds"):
            start_from_ids(backbone, params, kind, np.arange(4), most + 1)
    soft = Embeds(jnp.ones((most + 1, 32)))
    with pytest.raises(ContextError, match=f"position {most} exceeds"):
        jax.jit(backbone.lift)(params, soft)
