"""Properties of all encoders."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import V, hidden, lift, read, token_ids, weights

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.families import bert
from prefix_jax.backbones.layer import Layer
from prefix_jax.errors import BackboneError
from prefix_jax.methods.prompt import PromptTuning
from prefix_jax.nn.attention.mask import MaskAndBias, TokenLayout
from prefix_jax.nn.layers import AttentionInputs
from prefix_jax.prefix import Adapter, Embeds, Hidden, KVPrefix, Prefix, Produced, Site

B, P, T, L = 2, 5, 6, 3
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)

_SHARED: dict[str, Any] = {
    "num_hidden_layers": L,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": V,
    "max_position_embeddings": 40,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1},
    "electra": {"embedding_size": 16},
}
NAMES = tuple(_CONFIGS)


@functools.cache
def encoder(name: str) -> Backbone:
    arch = bert.architecture({"model_type": name, **_SHARED, **_CONFIGS[name]})
    return Backbone(dataclasses.replace(arch, pooler=name == "bert"))


@functools.cache
def params_of(name: str) -> Any:
    return weights(encoder(name))


@functools.cache
def texts() -> jax.Array:
    return token_ids(B, T, seed=2)


def present(rows: int, columns: int, name: str = "bert") -> TokenLayout:
    """Rows of two texts without padding; with token types if the encoder has them."""
    tokens = TokenLayout.plain(jnp.ones((rows, columns), bool))
    second = (jnp.arange(columns) >= columns // 2) & (encoder(name).arch.token_types > 1)
    return tokens.replace(token_type_BT=jnp.tile(second.astype(jnp.int32), (rows, 1)))


@functools.cache
def random_prefix(name: str, text_position: int = P) -> Prefix:
    g = encoder(name).geometry.main
    k, v = jax.random.normal(jax.random.key(3), (2, g.layers, P, g.kv_heads, g.head_dim))
    return Prefix(encoder=Site(KVPrefix(k, v)), text_position=text_position)


@functools.cache
def behind(name: str, prefixed: bool) -> jax.Array:
    """Hidden states of the rows, with the random prefix or without one."""
    prefix = random_prefix(name) if prefixed else None
    return hidden(encoder(name), params_of(name), texts(), present(B, T, name), prefix)[0]


@functools.cache
def random_states() -> jax.Array:
    return jax.random.normal(jax.random.key(6), (L, P, 32))


# No prefix is the bare model.


def test_no_prefix_is_the_bare_model_bit_for_bit() -> None:
    backbone, params, ids = encoder("bert"), params_of("bert"), texts()

    def program(*prefix: Any) -> str:
        run = jax.jit(lambda params, ids: backbone.hidden(params, ids, present(B, T), *prefix)[0])
        return run.lower(params, ids).as_text()

    assert program() == program(None) == program(backbone.lift(params, None))


def test_absent_slots_leave_the_bare_model() -> None:
    name = "bert"
    prefix = random_prefix(name, text_position=0)
    off = prefix.encoder.inside.replace(bias_LPN=jnp.full((L, P, 4), -jnp.inf))
    off = dataclasses.replace(prefix, encoder=Site(off))
    h_BTD, _ = hidden(encoder(name), params_of(name), texts(), present(B, T, name), off)
    close(h_BTD, behind(name, False), rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(behind(name, True) - behind(name, False)).max()) > 0.1


# Attention within rows.


def test_every_token_sees_the_whole_text() -> None:
    """The last token affects the first one."""
    changed = texts().at[:, -1].add(1) % V
    h_BTD, _ = hidden(encoder("bert"), params_of("bert"), changed, present(B, T))
    assert float(jnp.abs(h_BTD - behind("bert", False))[:, 0].max()) > 1e-3


@pytest.mark.parametrize("prefixed", [False, True], ids=["bare", "prefix"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_on_either_side_does_not_change_results(name: str, prefixed: bool) -> None:
    prefix = random_prefix(name) if prefixed else None
    token_type_BT = present(B, T, name).token_type_BT
    for left, right in ((3, 0), (0, 3), (1, 2)):
        width = ((0, 0), (left, right))
        ids = jnp.pad(texts(), width, constant_values=7)
        tokens = TokenLayout.plain(jnp.pad(jnp.ones((B, T), bool), width))
        tokens = tokens.replace(token_type_BT=jnp.pad(token_type_BT, width))
        out, _ = hidden(encoder(name), params_of(name), ids, tokens, prefix)
        close(out[:, left : left + T], behind(name, prefixed))
        assert jnp.isfinite(out).all()


@pytest.mark.parametrize("name", NAMES)
def test_packing_does_not_change_results(name: str) -> None:
    """One row with row 1, then row 0, then padding."""
    token_type_T = present(1, T, name).token_type_BT[0]
    ids = jnp.concatenate([texts()[1], texts()[0], jnp.zeros(2, jnp.int32)])[None]
    tokens = TokenLayout(
        segment_BT=jnp.array([[1] * T + [2] * T + [0] * 2]),
        branch_BT=jnp.zeros((1, 2 * T + 2), jnp.int32),
        position_BT=jnp.array([[*range(T), *range(T), 0, 0]]),
        token_type_BT=jnp.pad(jnp.tile(token_type_T, 2), (0, 2))[None],
    )
    packed = hidden(encoder(name), params_of(name), ids, tokens, random_prefix(name))[0][0]
    close(packed[:T], behind(name, True)[1])
    close(packed[T : 2 * T], behind(name, True)[0])
    assert jnp.isfinite(packed).all()


# Hidden states and soft tokens.


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_precede_the_tokens_of_every_layer(name: str) -> None:
    """Reference: each layer reads states and tokens, and its output at the states is dropped."""
    backbone, params = encoder(name), params_of(name)
    prefix = lift(backbone, params, Hidden(random_states()))
    h_BTD, _ = hidden(backbone, params, texts(), present(B, T, name), prefix)

    @jax.jit
    def by_hand(params: Any) -> jax.Array:
        stack = backbone.stack
        tokens = present(B, T, name)
        x_BTD = stack.embed_positions(params, params["embed"]["tokens_VD"][texts()], tokens, P)
        for index in range(L):
            layer = jax.tree.map(operator.itemgetter(index), params["layers"])
            states_BPD = jnp.tile(random_states()[index], (B, 1, 1))
            x_BSD = jnp.concatenate([states_BPD, x_BTD], axis=1)
            y_BSD, _ = Layer(backbone.arch).apply(
                {"params": layer}, x_BSD, AttentionInputs(MaskAndBias(None)), None, None
            )
            x_BTD = y_BSD[:, P:]
        return x_BTD

    close(h_BTD, by_hand(params))


@pytest.mark.parametrize("name", NAMES)
def test_soft_tokens_are_embeddings_before_the_text(name: str) -> None:
    """New entries at the end of the embedding table are soft tokens before every row."""
    backbone, params = encoder(name), params_of(name)
    x_PD = 0.1 * jax.random.normal(jax.random.key(5), (P, backbone.geometry.input_dim))
    prefix = lift(backbone, params, Embeds(x_PD))
    h_BTD, _ = hidden(backbone, params, texts(), present(B, T, name), prefix)
    table = jnp.concatenate([params["embed"]["tokens_VD"], x_PD])
    grown = {**params, "embed": {**params["embed"], "tokens_VD": table}}
    ids = jnp.concatenate([jnp.tile(V + jnp.arange(P), (B, 1)), texts()], axis=1)
    tokens = TokenLayout.plain(jnp.ones((B, P + T), bool))
    token_type_BT = jnp.pad(present(B, T, name).token_type_BT, ((0, 0), (P, 0)))
    expected, _ = hidden(backbone, grown, ids, tokens.replace(token_type_BT=token_type_BT))
    close(h_BTD, expected)


def test_soft_tokens_have_the_width_of_embeddings() -> None:
    geometry = encoder("electra").geometry
    assert (geometry.input_dim, geometry.d_model) == (16, 32)
    params = PromptTuning(length=P).init(jax.random.key(0), geometry, None)
    assert params["x_PD"].shape == (P, 16)
    assert encoder("bert").geometry.input_dim == 32


@pytest.mark.parametrize("name", NAMES)
def test_hidden_and_keys_values_of_a_text_lift_to_the_same_prefix(name: str) -> None:
    backbone, params = encoder(name), params_of(name)
    embeds, states, prefix = read(backbone, params, token_ids(P, seed=1))
    close(embeds.x_PD, params["embed"]["tokens_VD"][token_ids(P, seed=1)])
    assert list(prefix.sites) == ["encoder"]
    assert prefix.text_position == P
    jax.tree.map(close, lift(backbone, params, states), prefix)


# Gradients, and forms of weights.


def _produced(kind: str) -> Produced:
    if kind == "embeds":
        return Embeds(random_states()[0])
    if kind == "hidden":
        return Hidden(random_states())
    if kind == "adapter":
        return Adapter(random_states()[1:], jnp.ones((L - 1, 4)), layers=(1, 2))
    return random_prefix("bert")


KINDS = ("embeds", "hidden", "adapter", "prefix")


@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_parameter_receives_a_gradient(kind: str) -> None:
    backbone, params = encoder("bert"), params_of("bert")

    @jax.jit
    @jax.grad
    def gradient(produced: Any) -> jax.Array:
        prefix = backbone.lift(params, produced)
        h_BTD, _ = backbone.hidden(params, texts(), present(B, T), prefix)
        return jnp.sum(jnp.sin(h_BTD[:, -1]))

    for leaf in jax.tree.leaves(gradient(_produced(kind))):
        assert jnp.isfinite(leaf).all()
        assert float(jnp.abs(leaf.reshape(len(leaf), -1)).max(axis=1).min()) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_unstacked_layers_equal_stacked_ones(kind: str) -> None:
    backbone, stacked = encoder("bert"), params_of("bert")
    unstacked = backbone.unstacked(weights(backbone))
    h_BTD, expected = (
        hidden(backbone, params, texts(), present(B, T), lift(backbone, params, _produced(kind)))[0]
        for params in (unstacked, stacked)
    )
    close(h_BTD, expected)
    assert float(jnp.abs(expected[:, -T:] - behind("bert", False)).max()) > 0.01


# Positions, token types, the pooler.


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_text_position_shifts_positions_of_text(name: str) -> None:
    prefix = random_prefix(name, text_position=9)
    off = Site(prefix.encoder.inside.replace(bias_LPN=jnp.full((L, P, 4), -jnp.inf)))
    tokens = present(B, T, name)
    shifted = tokens.replace(position_BT=tokens.position_BT + 9)
    h_BTD, _ = hidden(
        encoder(name), params_of(name), texts(), tokens, dataclasses.replace(prefix, encoder=off)
    )
    close(h_BTD, hidden(encoder(name), params_of(name), texts(), shifted)[0])


def test_roberta_positions_start_after_the_padding_row() -> None:
    backbone, params = encoder("roberta"), params_of("roberta")
    assert backbone.arch.max_positions == 38
    table = params["embed"]["positions_TD"].at[:2].set(jnp.nan)
    h_BTD, _ = hidden(
        backbone,
        {**params, "embed": {**params["embed"], "positions_TD": table}},
        texts(),
        present(B, T, "roberta"),
    )
    np.testing.assert_array_equal(h_BTD, behind("roberta", False))


def test_token_types_distinguish_two_texts_and_default_to_the_first() -> None:
    backbone, params = encoder("bert"), params_of("bert")
    plain = TokenLayout.plain(jnp.ones((B, T), bool))
    first = plain.replace(token_type_BT=jnp.zeros((B, T), jnp.int32))
    h_BTD, _ = hidden(backbone, params, texts(), plain)
    np.testing.assert_array_equal(h_BTD, hidden(backbone, params, texts(), first)[0])
    assert float(jnp.abs(h_BTD - behind("bert", False)).max()) > 0.1


def test_pooler_reads_one_state_per_example() -> None:
    params, h_BD = params_of("bert"), behind("bert", False)[:, 0]
    pooler = params["pooler"]
    close(
        encoder("bert").pool(params, h_BD),
        jnp.tanh(h_BD @ pooler["weight_DD"] + pooler["bias_D"]),
    )
    assert "pooler" not in params_of("roberta")


def test_encoder_rejects_generation_with_advice() -> None:
    backbone, params = encoder("bert"), params_of("bert")
    with pytest.raises(BackboneError, match=r"bert is an encoder.* task with labels"):
        backbone.unembed(params, behind("bert", False))
    with pytest.raises(BackboneError, match=r"bert is an encoder.* task with labels"):
        backbone.empty_cache(params, B, T)
