"""Properties of all decoders."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import V, decoder, hidden, lift, present, read, token_ids, weights

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import Embeds, Hidden, KVPrefix, Prefix, Site

# Together these cover all variants: windows, q/k norms and two rotaries in Gemma 3, soft caps in
# Gemma 2, parallel layers with partial rotation in GPT-NeoX.
NAMES = ("gpt2", "llama", "gemma2", "gemma3", "neox")
WINDOWED = ("mistral", "gemma2")
B, P, T = 2, 5, 6
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)


@functools.cache
def params_of(name: str):
    return weights(decoder(name))


@functools.cache
def texts() -> tuple[jax.Array, jax.Array]:
    """A text of P tokens, and two rows of T tokens that follow it."""
    return token_ids(P, seed=1), token_ids(B, T, seed=2)


@functools.cache
def three_forms(name: str) -> tuple[Embeds, Hidden, Prefix]:
    return read(decoder(name), params_of(name), texts()[0])


@functools.cache
def prepended(name: str) -> jax.Array:
    """Hidden states of the rows after the actual text."""
    text_P, ids_BT = texts()
    ids = jnp.concatenate([jnp.tile(text_P, (B, 1)), ids_BT], axis=1)
    return hidden(decoder(name), params_of(name), ids, present(B, P + T))[0][:, P:]


@functools.cache
def random_prefix(name: str, **fields) -> Prefix:
    g = decoder(name).geometry.main
    k, v = jax.random.normal(jax.random.key(3), (2, g.layers, P, g.kv_heads, g.head_dim))
    return Prefix(Site(KVPrefix(k, v)), **{"text_position": P, **fields})


def behind(name: str, prefix: Prefix | None, ids_BT: jax.Array | None = None) -> jax.Array:
    ids_BT = texts()[1] if ids_BT is None else ids_BT
    return hidden(decoder(name), params_of(name), ids_BT, present(*ids_BT.shape), prefix)[0]


# Prefixes from a text.


@pytest.mark.parametrize("form", [0, 1, 2], ids=["embeds", "hidden", "prefix"])
@pytest.mark.parametrize("name", [*NAMES, "opt"])
def test_starting_from_a_text_equals_prepending_it(name, form):
    prefix = lift(decoder(name), params_of(name), three_forms(name)[form])
    close(behind(name, prefix), prepended(name))
    assert float(jnp.abs(behind(name, None) - prepended(name)).max()) > 0.01


def test_starts_from_text_are_embeddings_layer_inputs_and_keys_values():
    backbone, params = decoder("gpt2"), params_of("gpt2")
    embeds, states, prefix = three_forms("gpt2")
    g = backbone.geometry.main
    table = params["embed"]
    close(embeds.x_PD, table["tokens_VD"][texts()[0]])
    # The input of the first layer includes positions; soft tokens get theirs in `lift`.
    close(states.h_LPD[0], embeds.x_PD + table["positions_TD"][:P])
    assert states.h_LPD.shape == (g.layers, P, backbone.geometry.d_model)
    assert prefix.decoder.inside.k_LPKH.shape == (g.layers, P, g.kv_heads, g.head_dim)
    assert prefix.text_position == P
    assert {leaf.dtype for leaf in jax.tree.leaves((embeds, states, prefix))} == {
        jnp.dtype("float32")
    }


def test_starts_are_float32_for_a_bfloat16_model():
    backbone = decoder("llama")
    forms = read(backbone, weights(backbone, dtype=jnp.bfloat16), texts()[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(forms)} == {jnp.dtype("float32")}


def test_lift_returns_a_prefix_and_none_unchanged():
    backbone, prefix = decoder("llama"), random_prefix("llama")
    assert backbone.lift(params_of("llama"), prefix) is prefix
    assert backbone.lift(params_of("llama"), None) is None


def test_gradients_through_lift_equal_those_of_prepended_soft_tokens():
    """Running P soft tokens once gives the loss and gradients of prepending them to every row."""
    backbone, params = decoder("llama"), params_of("llama")
    ids_BT = texts()[1]
    weight_BTD = jax.random.normal(jax.random.key(4), (B, T, 32))

    @jax.jit
    @jax.value_and_grad
    def lifted(x_PD):
        prefix = backbone.lift(params, Embeds(x_PD))
        return jnp.sum(weight_BTD * backbone.hidden(params, ids_BT, present(B, T), prefix)[0])

    @jax.jit
    @jax.value_and_grad
    def joined(x_PD):
        # New entries at the end of the embedding table are soft tokens before every row.
        table = jnp.concatenate([params["embed"]["tokens_VD"], x_PD])
        soft = {**params, "embed": {"tokens_VD": table}}
        ids = jnp.concatenate([jnp.tile(V + jnp.arange(P), (B, 1)), ids_BT], axis=1)
        h_BTD, _ = backbone.hidden(soft, ids, present(B, P + T))
        return jnp.sum(weight_BTD * h_BTD[:, P:])

    x_PD = jax.random.normal(jax.random.key(5), (P, 32))
    (loss, grad), (expected, expected_grad) = lifted(x_PD), joined(x_PD)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-3, atol=1e-4)
    assert float(jnp.abs(grad).max()) > 0.1


# No prefix is the bare model.


def test_no_prefix_is_the_bare_model_bit_for_bit():
    backbone, params, ids = decoder("llama"), params_of("llama"), texts()[1]

    def program(*prefix) -> str:
        run = jax.jit(lambda params, ids: backbone.hidden(params, ids, present(B, T), *prefix)[0])
        return run.lower(params, ids).as_text()

    assert program() == program(None) == program(backbone.lift(params, None))


def test_absent_slots_leave_the_bare_model():
    """A prefix without visible slots and with text position 0 has no effect."""
    prefix = random_prefix("llama", text_position=0)
    bias = jnp.full((3, P, 4), -jnp.inf)
    off = dataclasses.replace(prefix, decoder=Site(prefix.decoder.inside.replace(bias_LPN=bias)))
    close(behind("llama", off), behind("llama", None), rtol=1e-5, atol=1e-6)


# Rows: packing, sharing, padding.


@pytest.mark.parametrize("name", NAMES)
def test_packing_does_not_change_results(name):
    ids_BT = texts()[1]
    prefix = random_prefix(name)
    alone = behind(name, prefix)
    # Row 1 first, truncated to 4 tokens; padding at the end.
    ids = jnp.concatenate([ids_BT[1, :4], ids_BT[0], jnp.zeros(2, jnp.int32)])[None]
    tokens = TokenLayout(
        jnp.array([[1] * 4 + [2] * T + [0] * 2]),
        jnp.zeros((1, 12), jnp.int32),
        jnp.array([[*range(4), *range(T), 0, 0]]),
    )
    packed = hidden(decoder(name), params_of(name), ids, tokens, prefix)[0][0]
    close(packed[:4], alone[1, :4])
    close(packed[4 : 4 + T], alone[0])
    assert jnp.isfinite(packed).all()


@pytest.mark.parametrize("name", NAMES)
def test_sharing_a_source_does_not_change_results(name):
    source, first, second = (token_ids(n, seed=n) for n in (5, 3, 4))
    prefix = random_prefix(name)
    ids = jnp.concatenate([source, first, second])[None]
    tokens = TokenLayout(
        jnp.ones((1, 12), jnp.int32),
        jnp.array([[0] * 5 + [1] * 3 + [2] * 4]),
        jnp.array([[*range(5), *range(5, 8), *range(5, 9)]]),
    )
    shared = hidden(decoder(name), params_of(name), ids, tokens, prefix)[0][0]
    for target, start in ((first, 5), (second, 8)):
        alone = behind(name, prefix, jnp.concatenate([source, target])[None])[0]
        close(shared[:5], alone[:5])
        close(shared[start : start + len(target)], alone[5:])


@pytest.mark.parametrize("name", NAMES)
def test_padding_does_not_change_real_tokens(name):
    ids_BT, prefix = texts()[1], random_prefix(name)
    expected = behind(name, prefix)
    for left, right in ((3, 0), (0, 3), (1, 2)):
        ids = jnp.pad(ids_BT, ((0, 0), (left, right)), constant_values=7)
        real = jnp.pad(jnp.ones((B, T), bool), ((0, 0), (left, right)))
        for behind_prefix, want in ((prefix, expected), (None, behind(name, None))):
            out, _ = hidden(
                decoder(name), params_of(name), ids, TokenLayout.plain(real), behind_prefix
            )
            close(out[:, left : left + T], want)
            assert jnp.isfinite(out).all()


# Caches and the two forms of weights.


@pytest.mark.parametrize("unstacked", [False, True], ids=["stacked", "unstacked"])
@pytest.mark.parametrize("name", NAMES)
def test_step_by_step_equals_one_pass(name, unstacked):
    backbone, ids_BT, prefix = decoder(name), texts()[1], random_prefix(name)
    params = weights(backbone)
    if unstacked:
        params = backbone.unstacked(params)
    cache = backbone.empty_cache(params, B, 4)
    out, cache = hidden(backbone, params, ids_BT[:, :3], present(B, 3), prefix, cache)
    steps = [out]
    cache = cache.grow(4)
    for t in range(3, T):
        ones = jnp.ones((B, 1), jnp.int32)
        tokens = TokenLayout(ones, 0 * ones, t * ones)
        out, cache = hidden(backbone, params, ids_BT[:, t : t + 1], tokens, prefix, cache)
        steps.append(out)
    close(jnp.concatenate(steps, axis=1), behind(name, prefix))
    assert int(cache.length) == T


@pytest.mark.parametrize("name", NAMES)
def test_unstacked_layers_equal_stacked_ones(name):
    backbone, ids_BT = decoder(name), texts()[1]
    params = backbone.unstacked(weights(backbone))
    for produced in three_forms(name):
        prefix = lift(backbone, params, produced)
        close(hidden(backbone, params, ids_BT, present(B, T), prefix)[0], prepended(name))
    for ours, theirs in zip(read(backbone, params, texts()[0]), three_forms(name), strict=True):
        jax.tree.map(close, ours, theirs)


def test_conversion_keeps_every_bit_and_frees_its_input():
    backbone = decoder("llama")
    params = weights(backbone)
    before = jax.tree.map(np.asarray, params)
    unstacked = backbone.unstacked(params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params["layers"]))
    assert backbone.unstacked(unstacked) is unstacked
    again = backbone.stacked(unstacked)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(unstacked["layers"]))
    assert backbone.stacked(again) is again
    jax.tree.map(np.testing.assert_array_equal, again, before)


@pytest.mark.parametrize("mode", ["dots", "mlp", "projections", "attention", "full"])
def test_remat_gives_equal_gradients(mode):
    ids_BT = texts()[1]

    def grad(remat):
        backbone = decoder("qwen3", remat)

        @jax.jit
        @jax.grad
        def scalar(h_LPD):
            prefix = backbone.lift(params_of("qwen3"), Hidden(h_LPD))
            h_BTD, _ = backbone.hidden(params_of("qwen3"), ids_BT, present(B, T), prefix)
            return jnp.sum(jnp.sin(h_BTD))

        return scalar(three_forms("qwen3")[1].h_LPD)

    # Rounding errors scale with a layer's largest gradients. Those of the first layer are a
    # thousand times larger, because its norm divides by the small values of embeddings.
    for found_PD, expected_PD in zip(grad(mode), grad("none"), strict=True):
        close(found_PD, expected_PD, rtol=0, atol=3e-5 * jnp.abs(expected_PD).max())


# Positions and windows.


def test_text_position_shifts_positions_of_text():
    """Without a prefix's slots, the text position only shifts positions."""
    backbone, params, ids_BT = decoder("gpt2"), params_of("gpt2"), texts()[1]
    prefix = random_prefix("gpt2", text_position=9)
    off = prefix.decoder.inside.replace(bias_LPN=jnp.full((3, P, 4), -jnp.inf))
    shifted = present(B, T)
    shifted = dataclasses.replace(shifted, position_BT=shifted.position_BT + 9)
    close(
        behind("gpt2", dataclasses.replace(prefix, decoder=Site(off))),
        hidden(backbone, params, ids_BT, shifted)[0],
    )


def test_rotary_attention_to_a_prefix_depends_on_the_text_position():
    near, far = (behind("llama", random_prefix("llama", text_position=n)) for n in (P, P + 20))
    assert float(jnp.abs(near - far).max()) > 1e-3


def _moved_by(name: str, prefix: Prefix, slots: slice) -> jax.Array:
    """The effect of some slots of the sliding layers on hidden states, [B, T]."""
    sliding = jnp.flatnonzero(jnp.array(decoder(name).arch.sliding))
    changed = jax.tree.map(lambda leaf: leaf.at[sliding, slots].add(3.0), prefix)
    return jnp.abs(behind(name, prefix) - behind(name, changed)).max(-1)


@pytest.mark.parametrize("name", WINDOWED)
def test_sliding_window_drops_a_prefix(name):
    """With window 4, token 0 at position 5 sees slots 2 to 4, and token 3 sees no slot. Slots 0
    and 1 have no effect."""
    prefix = random_prefix(name)
    np.testing.assert_array_equal(_moved_by(name, prefix, slice(0, 2)), 0)
    assert float(_moved_by(name, prefix, slice(2, 3))[:, 0].max()) > 1e-3


@pytest.mark.parametrize("name", WINDOWED)
def test_pinned_prefix_stays_visible(name):
    prefix = random_prefix(name, pinned=True)
    # In the last layer, which has a window, only the prefix itself can affect the last token.
    changed = jax.tree.map(lambda leaf: leaf.at[2, :2].add(3.0), prefix)
    moved = jnp.abs(behind(name, prefix) - behind(name, changed))
    assert float(moved[:, -1].max()) > 1e-3


def test_pinning_has_no_effect_without_a_window():
    np.testing.assert_array_equal(
        behind("llama", random_prefix("llama")),
        behind("llama", random_prefix("llama", pinned=True)),
    )


# Heads and types.


def test_untied_head_is_used_and_tied_head_is_the_embedding():
    h_BTD = jax.random.normal(jax.random.key(0), (1, 2, 32))
    tied, untied = params_of("llama"), params_of("qwen3")
    assert "head" not in tied
    close(decoder("llama").unembed(tied, h_BTD), h_BTD @ tied["embed"]["tokens_VD"].T)
    close(decoder("qwen3").unembed(untied, h_BTD), h_BTD @ untied["head"]["unembed_DV"])


def test_bfloat16_weights_give_bfloat16_states_and_float32_logits():
    backbone = decoder("qwen3")
    params = weights(backbone, dtype=jnp.bfloat16)
    h_BTD, _ = hidden(backbone, params, texts()[1], present(B, T), random_prefix("qwen3"))
    assert h_BTD.dtype == jnp.bfloat16
    assert backbone.unembed(params, h_BTD).dtype == jnp.float32
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    expected, _ = hidden(backbone, exact, texts()[1], present(B, T), random_prefix("qwen3"))
    error = jnp.linalg.norm(h_BTD.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    assert error < 0.05


def test_abstract_weights_have_the_shapes_of_real_ones():
    for name in NAMES:
        backbone = decoder(name)
        abstract = jax.eval_shape(backbone.init, jax.random.key(0))
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params_of(name))
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract) == shapes


def test_backbone_can_be_a_static_argument():
    assert hash(decoder("llama")) == hash(dataclasses.replace(decoder("llama")))
    assert isinstance(decoder("llama"), Backbone)
