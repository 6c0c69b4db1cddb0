"""GPT-NeoX and Pythia (Black et al. 2022, Biderman et al. 2023).

Layer norms and biases as in GPT-2; rotary positions in part of each head; attention and
feed-forward network in parallel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.families.config import complete
from prefix_jax.backbones.families.names import (
    LINEAR,
    STORED,
    Matrix,
    NameTable,
    Row,
    TokenTables,
    Vector,
    linear_rows,
    norm_rows,
)
from prefix_jax.backbones.families.rope import read_rotary

# The defaults of transformers' configuration class, by `model_type`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt_neox": {
        "vocab_size": 50_432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24_576,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
    },
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Reads a Hugging Face `config.json` of GPT-NeoX.

    Raises:
        BackboneError: the configuration has an unsupported variant.
    """
    config = complete(config, DEFAULTS["gpt_neox"])
    D, N = config["hidden_size"], config["num_attention_heads"]
    attention_bias = config["attention_bias"]
    return Architecture(
        model_type="gpt_neox",
        layers=config["num_hidden_layers"],
        d_model=D,
        heads=N,
        kv_heads=N,
        head_dim=D // N,
        d_ff=config["intermediate_size"],
        vocab=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        norm="layer",
        epsilon=config["layer_norm_eps"],
        activation=config["hidden_act"],
        gated=False,
        parallel=config["use_parallel_residual"],
        rotary=read_rotary(config, theta_key="rotary_emb_base", share_key="rotary_pct", share=0.25),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=True,
        tied=config["tie_word_embeddings"],
    )


def hf_names(arch: Architecture) -> NameTable:
    """The tensor names of a checkpoint in Hugging Face layout."""
    return _HF_NAMES


def _fused(name: str, part: int) -> tuple[Row, Row]:
    """The weight and the bias of queries, keys or values, which are fused head by head."""
    head = "NH" if name == "q" else "KH"
    stored = "layers.{l}.attention.query_key_value"
    return (
        Row(f"{stored}.weight", f"layers/attn/{name}_D{head}", Matrix(1, True, part, 3, True)),
        Row(f"{stored}.bias", f"layers/attn/{name}_bias_{head}", Vector(part, 3, True)),
    )


_HF_NAMES = NameTable(
    prefix="gpt_neox.",
    rows=(
        Row("embed_in.weight", "embed/tokens_VD", STORED),
        *norm_rows("layers.{l}.input_layernorm", "layers/attn_norm"),
        *_fused("q", 0),
        *_fused("k", 1),
        *_fused("v", 2),
        *linear_rows("layers.{l}.attention.dense", "layers/attn/o", "NHD", "D", Matrix(2)),
        *norm_rows("layers.{l}.post_attention_layernorm", "layers/mlp_norm"),
        *linear_rows("layers.{l}.mlp.dense_h_to_4h", "layers/mlp/up", "DF", "F"),
        *linear_rows("layers.{l}.mlp.dense_4h_to_h", "layers/mlp/down", "FD", "D"),
        *norm_rows("final_layer_norm", "final_norm"),
        Row("embed_out.weight", "head/unembed_DV", LINEAR),
    ),
    tokens=TokenTables("embed_in.weight", "embed_out.weight", stand_ins=("embed_out.weight",)),
    # Frequencies are computed from the configuration; old checkpoints contain the causal mask.
    ignored=(r"layers\.\d+\.attention\.(rotary_emb\.inv_freq|(masked_)?bias)",),
)
