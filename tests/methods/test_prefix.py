"""Prefix tuning at any choice of sites and layers, with separate parameters for each."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import decoder, hidden, lift, present, token_ids, weights

from prefix_jax.errors import ConfigError
from prefix_jax.methods.base import normal_like
from prefix_jax.methods.prefix import PrefixTuning
from prefix_jax.prefix import SITES, Geometry, SiteShape

# The decoder is deeper than the encoder and has other head groups.
G = Geometry(
    d_model=32,
    vocab=50,
    encoder=SiteShape(2, 4, 4, 8),
    decoder=SiteShape(3, 4, 2, 8),
    cross=SiteShape(3, 4, 2, 8),
)
P, KEY = 5, jax.random.key(0)
SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(SITES, size)]


@pytest.mark.parametrize("sites", SUBSETS, ids="+".join)
@pytest.mark.parametrize("mid", [None, 7])
def test_every_subset_of_sites_has_separate_parameters(sites, mid):
    method = PrefixTuning(P, sites=sites, mid_dim=mid)
    params = method.init(KEY, G, None)
    assert set(params) == set(sites)
    prefix = method(params)
    assert set(prefix.sites) == set(sites)
    for name, site in prefix.sites.items():
        shape = G.sites[name]
        assert site.inside.k_LPKH.shape == (shape.layers, P, shape.kv_heads, shape.head_dim)
        size = sum(leaf.size for leaf in jax.tree.leaves(params[name]))
        outputs = shape.layers * 2 * shape.kv_heads * shape.head_dim
        assert size == (P * outputs if mid is None else P * 32 + 33 * mid + (mid + 1) * outputs)


def test_default_is_every_site():
    assert set(PrefixTuning(P)(PrefixTuning(P).init(KEY, G, None)).sites) == set(SITES)


@pytest.mark.parametrize("mid", [None, 7])
def test_initial_output_equals_the_start_at_chosen_sites_and_layers(mid):
    start = normal_like(PrefixTuning(P).blank(G), KEY, 1.0)
    method = PrefixTuning(P, sites=("encoder", "cross"), layers=(1,), mid_dim=mid)
    prefix = method(method.init(KEY, G, start))
    assert set(prefix.sites) == {"encoder", "cross"}
    for name, site in prefix.sites.items():
        assert site.layers == (1,)
        expected = start.sites[name].inside.k_LPKH[1:2]
        np.testing.assert_allclose(site.inside.k_LPKH, expected, rtol=1e-3, atol=1e-4)
    # A stored prefix can be the start of the same method again.
    again = method(method.init(KEY, G, prefix))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), again, prefix)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": (2,)}, "layer 2; at the site 'encoder' this backbone has 0 to 1"),
        ({"layers": (3,), "sites": ("cross",)}, "layer 3; at the site 'cross' .* 0 to 2"),
    ],
)
def test_rejects_missing_layers(fields, message):
    with pytest.raises(ConfigError, match=message):
        PrefixTuning(P, **fields).init(KEY, G, None)


def test_rejects_missing_sites():
    alone = Geometry(d_model=32, vocab=50, decoder=SiteShape(3, 4, 2, 8))
    with pytest.raises(ConfigError, match="names 'cross'; this backbone has decoder"):
        PrefixTuning(P, sites=("cross",)).init(KEY, alone, None)


def test_prefix_of_some_layers_has_masked_slots_in_the_others():
    backbone = decoder("llama")
    params, ids, tokens = weights(backbone), token_ids(2, 7), present(2, 7)
    some = PrefixTuning(P, layers=(0, 2))
    full = PrefixTuning(P)
    whole = full(full.init(KEY, backbone.geometry, None))
    part = some(some.init(KEY, backbone.geometry, whole))

    def out(prefix) -> jax.Array:
        return hidden(backbone, params, ids, tokens, lift(backbone, params, prefix))[0]

    bias_LPN = jnp.zeros((3, P, 4)).at[1].set(-jnp.inf)
    inside = whole.decoder.inside.replace(bias_LPN=bias_LPN)
    absent = whole.replace(decoder=whole.decoder.replace(inside=inside))
    np.testing.assert_array_equal(out(part), out(absent))
    assert float(jnp.abs(out(part) - out(whole)).max()) > 0.01
