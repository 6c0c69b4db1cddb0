"""The PyTorch snippet of `docs/export.md` gives the logits of our model with the same prefix.

Runs only under `make parity`, whose environment has torch and transformers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax import artifact
from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.interop.export import export
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import Embeds

torch = pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["gpt2", "llama_grouped", "qwen3", "gemma2"])
def test_baked_prefix_is_a_warm_cache_in_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, difference: Any
) -> None:
    from transformers import AutoModelForCausalLM

    path = ROOT / "tests" / "fixtures" / "backbones" / name
    ours = load(path, dtype="float32")
    geometry, rng = ours.backbone.geometry, np.random.default_rng(0)
    embeds = Embeds(jnp.asarray(rng.normal(size=(5, geometry.d_model)), jnp.float32))
    backbone = artifact.BackboneCard(
        source=str(path),
        model_type=ours.backbone.arch.model_type,
        fingerprint=ours.fingerprint,
        dtype="float32",
    )
    artifact.save(tmp_path / "run", embeds, artifact.make_card(embeds, geometry, backbone))
    export(tmp_path / "run", tmp_path / "my-prefix", bake=True, model=ours)
    ids = rng.integers(0, 96, (2, 20), dtype=np.int32)

    document = (ROOT / "docs" / "export.md").read_text("utf-8")
    code = re.search(r"```python\n# transformers\n(.*?)```", document, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line]) == 10
    names = {
        "model": AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(),
        "ids": torch.from_numpy(ids).long(),
    }
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        exec(code, names)

    tokens = TokenLayout.plain(jnp.ones(ids.shape, bool))
    prefix = ours.backbone.lift(ours.params, embeds)
    h_BTD, _ = ours.backbone.hidden(ours.params, jnp.asarray(ids), tokens, prefix)
    logits_BTV = ours.backbone.unembed(ours.params, h_BTD)
    difference("baked prefix as cache", logits_BTV - names["logits"].numpy(), 1e-4, model=name)
