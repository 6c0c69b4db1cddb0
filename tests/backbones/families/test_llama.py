"""Configurations of the Llama family: omitted keys mean the same as in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from prefix_jax.backbones.families import llama
from prefix_jax.backbones.loading.config import architecture
from prefix_jax.errors import BackboneError

_SAID: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 48,
    "num_hidden_layers": 30,
    "num_attention_heads": 64,
}


@pytest.mark.parametrize("model_type", llama.DEFAULTS)
@pytest.mark.parametrize("windows", [{}, {"use_sliding_window": True}], ids=["", "windows"])
def test_omitted_keys_mean_the_same_as_in_transformers(
    model_type: str, windows: dict[str, bool]
) -> None:
    config = _SAID | windows
    whole = transformers.AutoConfig.for_model(model_type, **config).to_dict()
    assert whole.keys() > config.keys()
    assert llama.architecture({"model_type": model_type, **config}) == llama.architecture(whole)


def test_llama_has_no_window() -> None:
    # Models that were converted to Llama keep keys of their original family.
    arch = llama.architecture({"model_type": "llama", **_SAID, "sliding_window": 4096})
    assert (arch.window, arch.sliding) == (None, ())


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_rejects_rope_scaling_without_a_factor(kind: str) -> None:
    scaling = {"rope_type": kind, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    with pytest.raises(BackboneError, match="configuration of here lacks 'factor'"):
        architecture({"model_type": "llama", **_SAID, "rope_scaling": scaling}, "here")
