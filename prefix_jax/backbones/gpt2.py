"""GPT-2 (Radford et al. 2019): learned positions, layer norms, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.errors import BackboneError

MODEL_TYPES = ("gpt2",)


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Reads a Hugging Face `config.json` of GPT-2.

    Raises:
        BackboneError: the config asks for a variant that is not computed here.
    """
    for flag, usual in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if config.get(flag, usual) != usual:
            raise BackboneError(f"GPT-2 with {flag}={config[flag]} is not supported")
    D, N = config["n_embd"], config["n_head"]
    return Architecture(
        family="gpt2",
        model_type="gpt2",
        layers=config["n_layer"],
        d_model=D,
        heads=N,
        kv_heads=N,
        head_dim=D // N,
        d_ff=config.get("n_inner") or 4 * D,
        vocab=config["vocab_size"],
        max_positions=config["n_positions"],
        norm="layer",
        epsilon=config.get("layer_norm_epsilon", 1e-5),
        activation=config.get("activation_function", "gelu_new"),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=config.get("tie_word_embeddings", True),
    )
