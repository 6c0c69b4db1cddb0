"""The PyTorch snippet of `docs/export.md` gives the logits of our model behind the same prefix.

Collected by `make parity` alone, whose environment has torch and transformers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from prefix_jax import artifact
from prefix_jax.backbones.load import load
from prefix_jax.nn.mask import Tokens

torch = pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["gpt2", "llama_grouped", "qwen3"])
def test_a_prefix_is_a_warm_cache_in_transformers(
    name: str, tmp_path: Path, difference: Any
) -> None:
    from transformers import AutoModelForCausalLM

    path = ROOT / "tests" / "fixtures" / "backbones" / name
    ours = load(path, dtype="float32")
    rng = np.random.default_rng(0)
    _, _, prefix = ours.backbone.read(ours.params, jnp.arange(5, dtype=jnp.int32))
    prefix = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype("f4"), prefix)
    backbone = artifact.BackboneCard(
        source=str(path),
        model_type=ours.backbone.arch.model_type,
        fingerprint=ours.fingerprint,
        dtype="float32",
    )
    card = artifact.make_card(prefix, ours.backbone.geometry, backbone)
    artifact.save(tmp_path / "p", prefix, card, "safetensors")
    ids = rng.integers(0, 96, (1, 20), dtype=np.int32)

    document = (ROOT / "docs" / "export.md").read_text("utf-8")
    code = re.search(r"```python\n# transformers\n(.*?)```", document, re.DOTALL).group(1)
    names = {
        "arrays": load_file(tmp_path / "p" / "prefix.safetensors"),
        "card": json.loads((tmp_path / "p" / "prefix.json").read_text("utf-8")),
        "model": AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(),
        "ids": torch.from_numpy(ids).long(),
    }
    with torch.no_grad():
        exec(code, names)

    tokens = Tokens.plain(jnp.ones(ids.shape, bool))
    h_BTD, _ = ours.backbone.hidden(ours.params, jnp.asarray(ids), tokens, prefix)
    logits_BTV = ours.backbone.unembed(ours.params, h_BTD)
    difference("exported prefix as cache", logits_BTV - names["logits"].numpy(), 1e-4, model=name)
