"""Configurations of Gemma, as published and as written by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.backbones.loading.config import architecture, read_config
from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.backbones.starts import starts_from_text
from prefix_jax.errors import BackboneError
from prefix_jax.nn.rotary import Rotary

FIXTURES = Path(__file__).parents[2] / "fixtures" / "backbones"
# text_config of google/gemma-3-4b-it, verbatim, with omitted keys.
GEMMA_3_4B: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}


def test_omitted_keys_of_published_gemma_3_get_defaults() -> None:
    arch = architecture(GEMMA_3_4B, "here")
    assert (arch.heads, arch.kv_heads, arch.head_dim, arch.vocab) == (8, 4, 256, 262208)
    assert arch.rotary == Rotary(1_000_000.0, "linear", 8.0)
    assert arch.sliding_rotary == Rotary(10_000.0)
    assert arch.window == 1024
    assert [layer for layer, slides in enumerate(arch.sliding) if not slides] == [5, 11, 17, 23, 29]
    assert arch.tied


@pytest.mark.parametrize("variant", ["gemma2", "gemma3_text"])
def test_older_configs_mean_the_same(variant: str) -> None:
    config = read_config(FIXTURES / variant)
    older = json.loads(json.dumps(config))
    rope, kinds = older.pop("rope_parameters"), older.pop("layer_types")
    older["sliding_window_pattern"] = kinds.index("full_attention") + 1
    if variant == "gemma2":
        older["rope_theta"] = rope["rope_theta"]
    else:
        scaling = rope["full_attention"]
        older["rope_theta"] = scaling.pop("rope_theta")
        older["rope_scaling"] = scaling
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    assert architecture(older, "older") == architecture(config, "newer")


def test_gelu_of_gemma_1_is_the_tanh_approximation() -> None:
    config = read_config(FIXTURES / "gemma")
    assert architecture(config | {"hidden_act": "gelu"}, "") == architecture(config, "")


def test_embedding_scale_is_rounded_to_the_dtype() -> None:
    """sqrt(32) = 5.657 is 5.656 in bfloat16."""
    model = load(FIXTURES / "gemma", dtype="bfloat16")
    ids_P = jnp.arange(5)
    embeds, _, _ = starts_from_text(model.backbone, model.params, ids_P)
    table = model.params["embed"]["tokens_VD"]
    scaled = table[ids_P] * jnp.asarray(5.65625, jnp.bfloat16)
    np.testing.assert_array_equal(embeds.x_PD, scaled.astype(jnp.float32))


def test_rejects_unsupported_variants() -> None:
    config = read_config(FIXTURES / "gemma3_text")
    with pytest.raises(BackboneError, match="use_bidirectional_attention is not supported"):
        architecture(config | {"use_bidirectional_attention": True}, "here")
    with pytest.raises(BackboneError, match="attn_logit_softcapping is not supported"):
        architecture(config | {"attn_logit_softcapping": 50.0}, "here")


def test_only_gemma_3_reads_the_window_period() -> None:
    config = {"num_hidden_layers": 6, "sliding_window_pattern": 3}
    gemma2 = architecture({"model_type": "gemma2", **config}, "here")
    assert gemma2.sliding == (True, False) * 3
    gemma3 = architecture({"model_type": "gemma3_text", **config}, "here")
    assert gemma3.sliding == (True, True, False) * 2


@pytest.mark.parametrize("above", [None, True, False])
@pytest.mark.parametrize("inside", [None, True, False])
def test_multimodal_gemma_reads_the_top_level_tie(above: bool | None, inside: bool | None) -> None:
    text = GEMMA_3_4B["text_config"]
    if inside is not None:
        text = text | {"tie_word_embeddings": inside}
    config = GEMMA_3_4B | {"text_config": text}
    if above is not None:
        config["tie_word_embeddings"] = above
    assert architecture(config, "here").tied == (above is not False)


def test_multimodal_gemma_does_not_cap_logits() -> None:
    text = GEMMA_3_4B["text_config"] | {"final_logit_softcapping": 3.0}
    assert architecture(text, "here").logit_softcap == 3.0
    assert architecture(GEMMA_3_4B | {"text_config": text}, "here").logit_softcap is None


def test_gemma_1_ignores_keys_of_gemma_2() -> None:
    config = read_config(FIXTURES / "gemma")
    later = {
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "sliding_window": 5,
    }
    assert architecture(config | later, "later") == architecture(config, "here")
