"""Compares logits with transformers, for stored random models of every supported variant."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.backbones.loading.config import architecture, read_config
from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.nn.attention.mask import TokenLayout

pytestmark = pytest.mark.usefixtures("full_compilation")

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"
VARIANTS = sorted(path.name for path in FIXTURES.iterdir())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str) -> None:
    model = load(FIXTURES / variant, dtype="float32")
    expected = np.load(FIXTURES / variant / "expected.npz")
    tokens = TokenLayout.plain(jnp.ones(expected["ids"].shape, bool))
    h_BTD, _ = model.backbone.hidden(model.params, jnp.asarray(expected["ids"]), tokens)
    logits_BTV = model.backbone.unembed(model.params, h_BTD)
    np.testing.assert_allclose(logits_BTV, expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["llama_linear", "llama_llama3", "llama_yarn"])
def test_older_rope_settings_mean_the_same(variant: str) -> None:
    config = read_config(FIXTURES / variant)
    older = json.loads(json.dumps(config))
    rope = older.pop("rope_parameters")
    older["rope_theta"] = rope.pop("rope_theta")
    older["rope_scaling"] = rope
    assert architecture(older, "older") == architecture(config, "newer")
