"""Compares defaults and spellings of configuration keys with the installed transformers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import transformers

from prefix_jax.backbones.families import FAMILIES, gpt2
from prefix_jax.backbones.families.config import complete
from prefix_jax.backbones.loading.config import architecture

DEFAULTS = {model_type: family.DEFAULTS[model_type] for model_type, family in FAMILIES.items()}
SPELLINGS = {
    model_type: spellings
    for family in dict.fromkeys(FAMILIES.values())
    for model_type, spellings in getattr(family, "SPELLINGS", {}).items()
}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_defaults_match_transformers(model_type: str) -> None:
    config_class: Any = type(transformers.AutoConfig.for_model(model_type))
    theirs = {field.name: field.default for field in dataclasses.fields(config_class)}
    assert {key: theirs[key] for key in DEFAULTS[model_type]} == DEFAULTS[model_type]


@pytest.mark.parametrize("model_type", SPELLINGS)
def test_spellings_match_transformers(model_type: str) -> None:
    config_class: Any = type(transformers.AutoConfig.for_model(model_type))
    assert config_class.attribute_map == SPELLINGS[model_type]


def test_alternative_spelling_wins_over_the_usual_one() -> None:
    config = {"n_layer": 2, "num_hidden_layers": 3}
    assert complete(config, {}, gpt2.SPELLINGS["gpt2"])["n_layer"] == 3


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_config_without_any_value_describes_the_default_model(model_type: str) -> None:
    bare: dict[str, Any] = {"model_type": model_type}
    if model_type == "gemma3":
        bare["text_config"] = {}
    written = transformers.AutoConfig.for_model(model_type).to_json_string(use_diff=False)
    whole = json.loads(written)
    if model_type == "xlm-roberta":
        whole["model_type"] = model_type
    # Forced tokens are also read from generation_config.json.
    frame = {"start_id": None, "first_id": None, "last_id": None}
    ours, theirs = (
        dataclasses.replace(architecture(config, "here"), **frame) for config in (bare, whole)
    )
    assert ours == theirs


def test_electra_without_heads_has_four() -> None:
    arch = architecture({"model_type": "electra", "hidden_size": 64}, "here")
    assert (arch.heads, arch.head_dim) == (4, 16)
