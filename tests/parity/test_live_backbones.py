"""Compares logits with transformers on random models, shapes and seeds.

Runs only under `make parity`, whose environment has torch and transformers.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.nn.attention.mask import TokenLayout

pytest.importorskip("torch")


def _maker() -> ModuleType:
    script = Path(__file__).parents[1] / "fixtures" / "make_backbones.py"
    spec = importlib.util.spec_from_file_location("make_backbones", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _maker()


@pytest.mark.parametrize("seed", [100, 200])
@pytest.mark.parametrize("name", MAKER.CONFIGS)
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_logits_match_transformers(
    name: str, seed: int, shard: str, tmp_path: Path, difference: Any
) -> None:
    reference = MAKER.random_model(MAKER.CONFIGS[name], seed)
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    ids = np.random.default_rng(seed).integers(0, 96, (3, 40), dtype=np.int32)
    model = load(tmp_path, dtype="float32")
    tokens = TokenLayout.plain(jnp.ones(ids.shape, bool))
    h_BTD, _ = model.backbone.hidden(model.params, jnp.asarray(ids), tokens)
    logits_BTV = model.backbone.unembed(model.params, h_BTD)
    difference("logits", logits_BTV - MAKER.logits(reference, ids), limit=1e-4, model=name)
