"""Cartridges: every slot is trained except the first few."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.methods.base import normal
from prefix_jax.methods.cartridge import Cartridge
from prefix_jax.methods.prefix import PrefixTuning
from prefix_jax.prefix import Geometry, Prefix, SiteShape
from prefix_jax.train.partition import labels

SHAPE = SiteShape(3, 4, 2, 8)
G = Geometry(d_model=32, vocab=50, decoder=SHAPE)
P, KEY = 5, jax.random.key(0)


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_first_slots_are_frozen_and_the_others_train(frozen):
    method = Cartridge(P, frozen=frozen)
    params = {"prefix": method.init(KEY, G, None)}
    sizes = {"train": 0, "freeze": 0}
    for label, leaf in zip(*map(jax.tree.leaves, (labels(params), params)), strict=True):
        sizes[label] += leaf.size
    slot = 3 * 2 * 2 * 8
    assert sizes == {"train": (P - frozen) * slot, "freeze": frozen * slot}


def test_produces_its_start_at_initialisation():
    start = normal(Prefix, G, P, KEY, std=1.0)
    method, plain = Cartridge(P, frozen=2), PrefixTuning(P)
    ours, theirs = (each(each.init(KEY, G, start)) for each in (method, plain))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_dropout_does_not_affect_frozen_slots():
    method = Cartridge(50, frozen=10, dropout=0.5)
    k_LPKH = method(method.init(KEY, G, None), KEY).decoder.inside.k_LPKH
    assert (k_LPKH[:, :10] != 0).all()
    assert 0.4 < float(jnp.mean(k_LPKH[:, 10:] == 0)) < 0.6


def test_uses_the_decoder_of_an_encoder_decoder():
    both = Geometry(d_model=32, vocab=50, encoder=SHAPE, decoder=SHAPE, cross=SHAPE)
    method = Cartridge(P)
    start = normal(Prefix, both, P, KEY, std=1.0)
    assert set(method(method.init(KEY, both, start)).sites) == {"decoder"}
    alone = Geometry(d_model=32, vocab=50, encoder=SHAPE)
    assert set(method(method.init(KEY, alone, None)).sites) == {"encoder"}
