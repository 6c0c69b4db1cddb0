"""Compares logits of encoder-decoders with transformers, for stored random models of every variant,
without a prefix and with a prefix at every attention."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import SITES, KVPrefix, Prefix, Site

FIXTURES = Path(__file__).parents[1] / "fixtures" / "encoder_decoders"
VARIANTS = sorted(path.name for path in FIXTURES.iterdir())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str) -> None:
    model = load(FIXTURES / variant, dtype="float32")
    expected = np.load(FIXTURES / variant / "expected.npz")
    backbone, ids = model.backbone, jnp.asarray(expected["ids"])
    sites = {
        name: Site(KVPrefix(jnp.asarray(expected[f"k_{name}"]), jnp.asarray(expected[f"v_{name}"])))
        for name in SITES
    }
    prefix = Prefix.of(sites, text_position=sites["encoder"].length)
    source, present = (
        jnp.asarray(expected["source"]),
        TokenLayout.plain(jnp.asarray(expected["present"])),
    )
    for which, given in (("logits", None), ("prefixed", prefix)):
        encoded = backbone.encode(model.params, source, present, given)
        tokens = TokenLayout.plain(jnp.ones(ids.shape, bool))
        h_BTD, _ = backbone.hidden(model.params, ids, tokens, given, encoded=encoded)
        logits_BTV = backbone.unembed(model.params, h_BTD)
        np.testing.assert_allclose(logits_BTV, expected[which], rtol=0, atol=1e-4)
