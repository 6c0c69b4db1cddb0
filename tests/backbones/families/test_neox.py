"""Older and newer configurations of GPT-NeoX."""

from __future__ import annotations

from pathlib import Path

from prefix_jax.backbones.loading.config import architecture, read_config

FIXTURES = Path(__file__).parents[2] / "fixtures" / "backbones"


def test_older_configs_mean_the_same() -> None:
    config = read_config(FIXTURES / "neox")
    older = {name: value for name, value in config.items() if name != "rope_parameters"}
    older |= {"rotary_pct": 0.5, "rotary_emb_base": 10000}
    assert architecture(older, "older") == architecture(config, "newer")
    # By default, a quarter of each head rotates.
    del older["rotary_pct"]
    assert architecture(older, "older").rotary.share == 0.25
