"""Compares prefixes under sliding windows with PEFT.

Runs only under `make parity`, whose environment has torch, transformers and peft.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.nn.attention.mask import TokenLayout
from prefix_jax.prefix import KVPrefix, Prefix, Site

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"
VARIANTS = ("mistral_window", "gemma2", "gemma3_text")
WINDOW = 7  # in all layers


def _reference(variant: str, length: int, **config: Any) -> Any:
    """PEFT's model with a random prefix."""
    torch.manual_seed(length)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        FIXTURES / variant, dtype=torch.float32, attn_implementation="eager", **config
    )
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    return peft.get_peft_model(model, prefix).eval()


def _difference(variant: str, reference: Any, length: int, tokens: int, pinned: bool) -> np.ndarray:
    """Our logits minus PEFT's, with its prefix."""
    ids = np.random.default_rng(0).integers(0, 96, (2, tokens), dtype=np.int32)
    ours = load(FIXTURES / variant, dtype="float32")
    shape = ours.backbone.geometry.main
    flat = reference.prompt_encoder["default"].embedding.weight.detach().numpy()
    split = flat.reshape(length, shape.layers, 2, shape.kv_heads, shape.head_dim)
    k_LPKH, v_LPKH = jnp.asarray(split.transpose(2, 1, 0, 3, 4))
    prefix = Prefix(Site(KVPrefix(k_LPKH, v_LPKH)), text_position=length, pinned=pinned)
    present = TokenLayout.plain(jnp.ones(ids.shape, bool))
    h_BTD, _ = ours.backbone.hidden(ours.params, jnp.asarray(ids), present, prefix)
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids).long()).logits.numpy()
    return np.asarray(ours.backbone.unembed(ours.params, h_BTD)) - expected


@pytest.mark.parametrize("length", [WINDOW - 2, WINDOW + 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sliding_window_drops_a_prefix_as_in_peft(
    variant: str, length: int, difference: Any
) -> None:
    value = _difference(variant, _reference(variant, length), length, tokens=12, pinned=False)
    difference("prefix with a sliding window", value, limit=1e-4, model=variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pinned_prefix_equals_a_wide_window(variant: str, difference: Any) -> None:
    """PEFT cannot pin. As long as the text fits the window, a window wider than text and prefix is
    equivalent to a narrow one with a pinned prefix."""
    wide = _reference(variant, WINDOW + 2, sliding_window=64)
    value = _difference(variant, wide, WINDOW + 2, tokens=WINDOW, pinned=True)
    difference("pinned prefix", value, limit=1e-4, model=variant)
