"""Properties of all encoder-decoders."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decoders import decoder, hidden, lift, present, read, token_ids
from encoder_decoders import (
    NAMES,
    biased,
    encode,
    encoder_decoder,
    params_of,
    random_prefix,
    states,
    weights,
)

from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.errors import BackboneError, PrefixError
from prefix_jax.mesh import make_mesh
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import SITES, Embeds, Hidden, KVPrefix, Prefix, Site

pytestmark = pytest.mark.parametrize("name", NAMES)

B, P, S, T = 2, 3, 7, 6
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)


@functools.cache
def texts() -> tuple[jax.Array, jax.Array]:
    """Two sources of S tokens, and two targets of T tokens."""
    return token_ids(B, S, seed=1), token_ids(B, T, seed=2)


def run(
    name: str,
    prefix: Prefix | None = None,
    source: tuple[jax.Array, TokenLayout] | None = None,
    target: tuple[jax.Array, TokenLayout] | None = None,
) -> jax.Array:
    source_BS, ids_BT = texts()
    source = source or (source_BS, present(B, S))
    target = target or (ids_BT, present(B, T))
    return states(encoder_decoder(name), params_of(name), *source, *target, prefix)


@functools.cache
def alone(name: str) -> jax.Array:
    """Hidden states of the texts with a prefix at every site."""
    return run(name, random_prefix(name, P, text_position=P))


# Token layouts.


def padded(ids_BT: jax.Array, before: int, after: int) -> tuple[jax.Array, TokenLayout]:
    mask = jnp.pad(jnp.ones(ids_BT.shape, bool), ((0, 0), (before, after)))
    return jnp.pad(ids_BT, ((0, 0), (before, after)), constant_values=9), TokenLayout.plain(mask)


@pytest.mark.parametrize("sides", [(0, 3, 0, 2), (3, 0, 2, 0), (1, 2, 1, 1)])
def test_padding_of_sources_and_targets_does_not_change_results(name, sides):
    source, target = padded(texts()[0], *sides[:2]), padded(texts()[1], *sides[2:])
    h_BTD = run(name, random_prefix(name, P, text_position=P), source, target)
    close(h_BTD[:, sides[2] : sides[2] + T], alone(name))


def joined(ids_BT: jax.Array) -> tuple[jax.Array, TokenLayout]:
    """Packs two rows into one."""
    _, length = ids_BT.shape
    segment = jnp.repeat(jnp.arange(1, B + 1), length)[None]
    tokens = TokenLayout(segment, 0 * segment, jnp.tile(jnp.arange(length), B)[None])
    return ids_BT.reshape(1, -1), tokens


def test_packing_does_not_change_results(name):
    source, target = map(joined, texts())
    packed = run(name, random_prefix(name, P, text_position=P), source, target)
    close(packed.reshape(B, T, -1), alone(name))


def test_several_targets_share_one_source(name):
    source_BS, ids_BT = texts()
    ids, tokens = joined(ids_BT)
    branches = TokenLayout(jnp.ones_like(ids), tokens.segment_BT, tokens.position_BT)
    prefix = random_prefix(name, P, text_position=P)
    shared = run(name, prefix, (source_BS[:1], present(1, S)), (ids, branches))
    apart = run(name, prefix, (jnp.tile(source_BS[:1], (B, 1)), present(B, S)))
    close(shared.reshape(B, T, -1), apart)


# Prefixes.


def test_slots_with_bias_minus_infinity_have_no_effect(name):
    sites = random_prefix(name, P, text_position=0).sites
    nothing = {site: biased(name, site, sites[site], -jnp.inf) for site in SITES}
    bare = run(name)
    close(run(name, Prefix.of(nothing)), bare)
    for site in SITES:
        only = run(name, Prefix.of({site: sites[site]}))
        present_here = {site: biased(name, site, sites[site], 0.0)}
        close(only, run(name, Prefix.of(nothing | present_here)))
        assert float(jnp.abs(only - bare).max()) > 0.01


def test_site_of_some_layers_has_masked_slots_in_the_others(name):
    backbone, params = encoder_decoder(name), params_of(name)
    sites = random_prefix(name, P, text_position=P).sites
    some, full = {}, {}
    for site, layers in {"encoder": (1,), "decoder": (0,), "cross": (0, 1)}.items():
        index, inside = jnp.array(layers), biased(name, site, sites[site], -jnp.inf).inside
        some[site] = Site(KVPrefix(inside.k_LPKH[index], inside.v_LPKH[index]), layers=layers)
        full[site] = Site(inside.replace(bias_LPN=inside.bias_LPN.at[index].set(0.0)))
    lifted = lift(backbone, params, Prefix.of(some, text_position=P))
    close(run(name, lifted), run(name, Prefix.of(full, text_position=P)))
    beyond = backbone.geometry.encoder.layers
    missing = Prefix.of({"encoder": Site(some["encoder"].inside, layers=(beyond,))})
    with pytest.raises(PrefixError, match=f"layer {beyond};"):
        backbone.lift(params, missing)


def test_soft_tokens_are_embeddings_before_the_source(name):
    text_P, (source_BS, _) = token_ids(P, seed=3), texts()
    embeds, *_ = read(encoder_decoder(name), params_of(name), text_P)
    prefix = lift(encoder_decoder(name), params_of(name), Embeds(embeds.x_PD))
    ids = jnp.concatenate([jnp.tile(text_P, (B, 1)), source_BS], axis=1)
    prepended = run(name, None, (ids, present(B, P + S)))
    close(run(name, prefix), prepended)
    close(run(name, prefix, padded(source_BS, 2, 1)), prepended)


def test_gradients_reach_every_layer_of_every_site(name):
    prefix = random_prefix(name, P, text_position=P)

    def total(prefix: Prefix) -> jax.Array:
        return jnp.sum(run(name, prefix)[..., 0])

    slopes = jax.grad(total)(prefix)
    for site in SITES:
        for slope_LPKH in (slopes.sites[site].inside.k_LPKH, slopes.sites[site].inside.v_LPKH):
            assert float(jnp.abs(slope_LPKH).max(axis=(1, 2, 3)).min()) > 1e-4
    step = jax.tree.map(lambda slope: 1e-3 * slope / jnp.linalg.norm(slope), slopes)
    ahead = total(jax.tree.map(jnp.add, prefix, step))
    behind = total(jax.tree.map(jnp.subtract, prefix, step))
    expected = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slopes, step)))
    np.testing.assert_allclose((ahead - behind) / 2, expected, rtol=0.02)


# Prefixes from a text.


def test_duplicated_keys_and_values_of_a_text_change_nothing(name):
    text_S = texts()[0][0]
    sites = read(encoder_decoder(name), params_of(name), text_S)[2].sites
    source = (jnp.tile(text_S, (B, 1)), present(B, S))
    for site in ("encoder", "cross"):
        close(run(name, Prefix.of({site: sites[site]}), source), run(name, None, source))


def test_decoder_start_from_a_text_equals_prepending_it(name):
    text_P, (_, ids_BT) = token_ids(P, seed=3), texts()
    prefix = read(encoder_decoder(name), params_of(name), text_P)[2]
    source = (jnp.tile(text_P, (B, 1)), present(B, P))
    begun = run(
        name, Prefix.of({"decoder": prefix.decoder}, text_position=prefix.text_position), source
    )
    ids = jnp.concatenate([jnp.tile(text_P, (B, 1)), ids_BT], axis=1)
    close(begun, run(name, None, source, (ids, present(B, P + T)))[:, P:])


# Decoding.


def test_unstacked_step_by_step_decoding_equals_one_pass(name):
    backbone, prefix = encoder_decoder(name), random_prefix(name, P, text_position=P)
    params = backbone.unstacked(weights(backbone))
    source_BS, ids_BT = texts()
    encoded = encode(backbone, params, source_BS, present(B, S), prefix)
    cache, steps = backbone.empty_cache(params, B, T), []
    for column in range(T):
        tokens = TokenLayout(*(jnp.full((B, 1), number) for number in (1, 0, column)))
        step = (ids_BT[:, column : column + 1], tokens, prefix, cache, None, encoded)
        h_B1D, cache = hidden(backbone, params, *step)
        steps.append(h_B1D)
    close(jnp.concatenate(steps, axis=1), alone(name))


# Errors.


def test_errors_name_the_mistake(name):
    backbone, params = encoder_decoder(name), params_of(name)
    source_BS, ids_BT = texts()
    with pytest.raises(BackboneError, match=f"{name} has an encoder"):
        backbone.hidden(params, ids_BT, present(B, T))
    gpt2 = decoder("gpt2")
    with pytest.raises(BackboneError, match="gpt2 is a single stack"):
        gpt2.encode(params, source_BS, present(B, S))
    with pytest.raises(PrefixError, match=r"in an encoder-decoder.*use keys and values"):
        backbone.lift(params, Hidden(jnp.zeros((2, P, 32))))


# Weights.


def test_sharded_weights_survive_conversion(name, tmp_path: Path):
    path = {"t5": tiny.write_t5, "bart": tiny.write_bart}[name](tmp_path / name)
    whole, split = load(path), load(path, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    assert whole.fingerprint == split.fingerprint
    k_LDKH = split.params["encoder"]["layers"]["attn"]["k_DKH"]
    L, D, K, H = k_LDKH.shape
    assert k_LDKH.sharding.shard_shape(k_LDKH.shape) == (L, D // 2, K // 2, H)
    before = jax.tree.map(np.asarray, whole.params)
    unstacked = whole.unstacked()
    assert [len(part["layers"]) for part in (unstacked, unstacked["encoder"])] == [
        part["layers"]["attn_norm"]["scale_D"].shape[0] for part in (before, before["encoder"])
    ]
    jax.tree.map(np.testing.assert_array_equal, whole.stacked(), before)
