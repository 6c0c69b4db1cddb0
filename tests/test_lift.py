"""Tests `lift` with a model whose keys and values are constants."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.errors import PrefixError
from prefix_jax.lift import lift
from prefix_jax.prefix import (
    Adapter,
    Embeds,
    Gated,
    Geometry,
    Hidden,
    KVPrefix,
    Prefix,
    Site,
    SiteShape,
)

L, P, N, K, H, D = 3, 2, 4, 2, 8, 16
SHAPE = SiteShape(L, N, K, H)
DECODER = Geometry(D, 50, decoder=SHAPE)
ENCODER = Geometry(D, 50, encoder=SHAPE)
ENCODER_DECODER = Geometry(D, 50, decoder=SHAPE, encoder=SHAPE, cross=SHAPE)


class Model:
    """Returns 1 for prompts, 2 for states and 3 for projections."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry

    def prompt_keys_values(self, weights, x_APD):
        return _constant(1, L, x_APD.shape[0] * x_APD.shape[1])

    def state_keys_values(self, weights, h_LPD):
        return _constant(2, *h_LPD.shape[:2])

    def projected_keys_values(self, weights, h_LPD, layers):
        return _constant(3, *h_LPD.shape[:2])


def _constant(value, layers, slots):
    return (jnp.full((layers, slots, K, H), float(value)),) * 2


def test_prefix_at_all_layers_is_returned_unchanged():
    prefix = Prefix(Site(KVPrefix(*_constant(0, L, P))), text_position=P)
    assert lift(Model(DECODER), {}, prefix) is prefix
    assert lift(Model(DECODER), {}, None) is None


def test_soft_tokens_run_through_a_decoder():
    prefix = lift(Model(DECODER), {}, Embeds(jnp.ones((P, D))))
    assert (prefix.length, prefix.text_position, prefix.bank_size) == (P, P, None)
    assert (prefix.decoder.inside.k_LPKH == 1).all()


def test_bank_has_the_slots_of_every_prefix():
    prefix = lift(Model(DECODER), {}, Embeds(jnp.ones((3 * P, D)), bank_size=3))
    assert (prefix.length, prefix.text_position, prefix.bank_size) == (P, P, 3)
    assert prefix.decoder.length == 3 * P


@pytest.mark.parametrize("geometry", [ENCODER, ENCODER_DECODER])
def test_soft_tokens_before_an_encoder_stay_soft_tokens(geometry):
    x_PD = jnp.ones((P, D))
    prefix = lift(Model(geometry), {}, Embeds(x_PD))
    assert prefix.embeds_PD is x_PD
    assert (prefix.sites, prefix.text_position) == ({}, 0)


@pytest.mark.parametrize(("geometry", "site"), [(DECODER, "decoder"), (ENCODER, "encoder")])
def test_hidden_states_become_keys_and_values_of_a_single_stack(geometry, site):
    prefix = lift(Model(geometry), {}, Hidden(jnp.ones((L, P, D))))
    assert list(prefix.sites) == [site]
    assert (prefix.sites[site].inside.k_LPKH == 2).all()
    assert prefix.text_position == P


def test_encoder_decoder_rejects_hidden_states():
    with pytest.raises(PrefixError, match="use keys and values"):
        lift(Model(ENCODER_DECODER), {}, Hidden(jnp.ones((L, P, D))))


def test_adapter_is_outside_the_softmax_and_closed_in_other_layers():
    adapter = Adapter(jnp.ones((1, P, D)), jnp.ones((1, 1)), layers=(2,))
    prefix = lift(Model(DECODER), {}, adapter)
    gated = prefix.decoder.outside
    assert isinstance(gated, Gated)
    assert prefix.decoder.inside is None
    assert prefix.text_position == 0
    np.testing.assert_array_equal(gated.gate_LN, [[0] * N, [0] * N, [1] * N])


def test_site_of_some_layers_has_masked_slots_in_the_others():
    prefix = Prefix(Site(KVPrefix(*_constant(5, 2, P)), layers=(0, 2)), text_position=P)
    lifted = lift(Model(DECODER), {}, prefix)
    assert lifted.decoder.layers is None
    bias_LPN = lifted.decoder.inside.bias_LPN
    assert (bias_LPN[jnp.array([0, 2])] == 0).all()
    assert (bias_LPN[1] == -jnp.inf).all()
    assert lifted.text_position == P


def test_names_a_missing_site_and_a_missing_layer():
    keys_values = KVPrefix(*_constant(0, 1, P))
    with pytest.raises(PrefixError, match="has a site 'cross'; this model has decoder"):
        lift(Model(DECODER), {}, Prefix(cross=Site(keys_values)))
    with pytest.raises(PrefixError, match="covers layer 3; this model has layers 0 to 2"):
        lift(Model(DECODER), {}, Prefix(Site(keys_values, layers=(3,))))
