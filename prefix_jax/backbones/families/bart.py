"""BART (Lewis et al. 2020): an encoder-decoder with learned positions and post-layer norms."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from prefix_jax.backbones.architecture import Architecture, encoder_decoder
from prefix_jax.backbones.families.config import complete
from prefix_jax.backbones.families.names import (
    LINEAR,
    STORED,
    Matrix,
    NameTable,
    Row,
    TokenTables,
    attention_rows,
    linear_rows,
    norm_rows,
)

# The defaults of transformers' configuration class, by `model_type`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "bart": {
        "vocab_size": 50_265,
        "max_position_embeddings": 1024,
        "encoder_layers": 12,
        "encoder_ffn_dim": 4096,
        "encoder_attention_heads": 16,
        "decoder_layers": 12,
        "decoder_ffn_dim": 4096,
        "decoder_attention_heads": 16,
        "activation_function": "gelu",
        "d_model": 1024,
        "scale_embedding": False,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "tie_word_embeddings": True,
    },
}
SPELLINGS: dict[str, dict[str, str]] = {
    "bart": {
        "num_attention_heads": "encoder_attention_heads",
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
    },
}

# The row of position 0 in the position table.
_OFFSET = 2

_SHARED = "shared.weight"
_ENCODER, _DECODER = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
_HEAD, _BIAS = "lm_head.weight", "final_logits_bias"


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Reads a Hugging Face `config.json` of BART."""
    config = complete(config, DEFAULTS["bart"], SPELLINGS["bart"])
    D, positions = config["d_model"], config["max_position_embeddings"]

    def stack(name: str) -> Architecture:
        N = config[f"{name}_attention_heads"]
        return Architecture(
            model_type="bart",
            layers=config[f"{name}_layers"],
            d_model=D,
            heads=N,
            kv_heads=N,
            head_dim=D // N,
            d_ff=config[f"{name}_ffn_dim"],
            vocab=config["vocab_size"],
            max_positions=positions,
            norm="layer",
            epsilon=1e-5,
            activation=config["activation_function"],
            gated=False,
            causal=name == "decoder",
            norm_at="after",
            final_norm=False,
            positions=positions + _OFFSET,
            position_offset=_OFFSET,
            embed_scale=D**0.5 if config["scale_embedding"] else None,
            embed_norm=True,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
        )

    decoder = dataclasses.replace(
        stack("decoder"), tied=config["tie_word_embeddings"], head_bias=True
    )
    return encoder_decoder(stack("encoder"), decoder, config, start="eos_token_id")


def as_stored(arch: Architecture, stored: Collection[str]) -> Architecture:
    """Adds the head's bias if the checkpoint has one. A pretrained BART without a task has none."""
    return dataclasses.replace(arch, head_bias=_BIAS in stored)


def hf_names(arch: Architecture) -> NameTable:
    """The tensor names of a checkpoint in Hugging Face layout."""
    return NameTable(
        prefix="model.",
        rows=(
            Row(_SHARED, "embed/tokens_VD", STORED),
            Row(_ENCODER, "encoder/embed/tokens_VD", STORED),
            *_stack("encoder", "encoder/"),
            *_stack("decoder", ""),
            Row(_HEAD, "head/unembed_DV", LINEAR),
            Row(_BIAS, "head/bias_V", Matrix(inputs=0, transposed=False)),  # stored [1, V]
        ),
        tokens=TokenTables(_SHARED, _HEAD, _ENCODER, _DECODER, (_HEAD, _DECODER, _ENCODER)),
        ignored=(r"(en|de)coder\.version",),
    )


def _attention(theirs: str, ours: str) -> list[Row]:
    """The rows of an attention and its norm."""
    return [
        *attention_rows(theirs, ours, "out_proj"),
        *norm_rows(f"{theirs}_layer_norm", f"{ours}_norm"),
    ]


def _stack(theirs: str, ours: str) -> list[Row]:
    """The rows of an encoder or a decoder."""
    layer, path = f"{theirs}.layers.{{l}}", f"{ours}layers"
    return [
        Row(f"{theirs}.embed_positions.weight", f"{ours}embed/positions_TD", STORED),
        *norm_rows(f"{theirs}.layernorm_embedding", f"{ours}embed/norm"),
        *_attention(f"{layer}.self_attn", f"{path}/attn"),
        *(_attention(f"{layer}.encoder_attn", f"{path}/cross") if theirs == "decoder" else ()),
        *linear_rows(f"{layer}.fc1", f"{path}/mlp/up", "DF", "F"),
        *linear_rows(f"{layer}.fc2", f"{path}/mlp/down", "FD", "D"),
        *norm_rows(f"{layer}.final_layer_norm", f"{path}/mlp_norm"),
    ]
