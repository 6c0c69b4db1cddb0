"""OPT (Zhang et al. 2022): like GPT-2, with ReLU; position 0 is row 2 of its table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.families.config import complete
from prefix_jax.backbones.families.names import (
    LINEAR,
    STORED,
    NameTable,
    Row,
    TokenTables,
    attention_rows,
    linear_rows,
    norm_rows,
)
from prefix_jax.errors import BackboneError

# The defaults of transformers' configuration class, by `model_type`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "opt": {
        "vocab_size": 50_272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "num_attention_heads": 12,
        "activation_function": "relu",
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    },
}
_POSITION_OFFSET = 2


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Reads a Hugging Face `config.json` of OPT.

    Raises:
        BackboneError: the configuration has an unsupported variant.
    """
    config = complete(config, DEFAULTS["opt"])
    D, N = config["hidden_size"], config["num_attention_heads"]
    for field, usual in (
        ("do_layer_norm_before", True),
        ("word_embed_proj_dim", D),
        ("layer_norm_elementwise_affine", True),
    ):
        if config.get(field) not in (usual, None):
            raise BackboneError(
                f"OPT with {field}={config[field]} is not supported (350M is the only published "
                "size of this kind)"
            )
    bias, positions = config["enable_bias"], config["max_position_embeddings"]
    return Architecture(
        model_type="opt",
        layers=config["num_hidden_layers"],
        d_model=D,
        heads=N,
        kv_heads=N,
        head_dim=D // N,
        d_ff=config["ffn_dim"],
        vocab=config["vocab_size"],
        max_positions=positions,
        norm="layer",
        epsilon=1e-5,
        activation=config["activation_function"],
        gated=False,
        final_norm=not config.get("_remove_final_layer_norm", False),
        positions=positions + _POSITION_OFFSET,
        position_offset=_POSITION_OFFSET,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied=config["tie_word_embeddings"],
    )


def hf_names(arch: Architecture) -> NameTable:
    """The tensor names of a checkpoint in Hugging Face layout."""
    return _HF_NAMES


_LAYER = "decoder.layers.{l}"
_HF_NAMES = NameTable(
    prefix="model.",
    rows=(
        Row("decoder.embed_tokens.weight", "embed/tokens_VD", STORED),
        Row("decoder.embed_positions.weight", "embed/positions_TD", STORED),
        *norm_rows(f"{_LAYER}.self_attn_layer_norm", "layers/attn_norm"),
        *attention_rows(f"{_LAYER}.self_attn", "layers/attn", "out_proj"),
        *norm_rows(f"{_LAYER}.final_layer_norm", "layers/mlp_norm"),
        *linear_rows(f"{_LAYER}.fc1", "layers/mlp/up", "DF", "F"),
        *linear_rows(f"{_LAYER}.fc2", "layers/mlp/down", "FD", "D"),
        *norm_rows("decoder.final_layer_norm", "final_norm"),
        Row("lm_head.weight", "head/unembed_DV", LINEAR),
    ),
    tokens=TokenTables(
        "decoder.embed_tokens.weight", "lm_head.weight", stand_ins=("lm_head.weight",)
    ),
)
