"""GPT-2 (Radford et al. 2019): learned positions, layer norms, biases in all projections."""

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
from prefix_jax.errors import BackboneError

# The defaults of transformers' configuration class, by `model_type`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 50_257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
}
SPELLINGS: dict[str, dict[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Reads a Hugging Face `config.json` of GPT-2.

    Raises:
        BackboneError: the configuration has an unsupported variant.
    """
    config = complete(config, DEFAULTS["gpt2"], SPELLINGS["gpt2"])
    for flag, usual in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if config[flag] != usual:
            raise BackboneError(f"GPT-2 with {flag}={config[flag]} is not supported")
    D, N = config["n_embd"], config["n_head"]
    return Architecture(
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
        epsilon=config["layer_norm_epsilon"],
        activation=config["activation_function"],
        gated=False,
        positions=config["n_positions"],
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=config["tie_word_embeddings"],
    )


def _conv(part: int) -> Matrix:
    """Queries (0), keys (1) or values (2) of a fused `Conv1D`, stored [in, out]."""
    return Matrix(transposed=False, part=part, parts=3)


def hf_names(arch: Architecture) -> NameTable:
    """The tensor names of a checkpoint in Hugging Face layout."""
    return _HF_NAMES


_HF_NAMES = NameTable(
    prefix="transformer.",
    rows=(
        Row("wte.weight", "embed/tokens_VD", STORED),
        Row("wpe.weight", "embed/positions_TD", STORED),
        *norm_rows("h.{l}.ln_1", "layers/attn_norm"),
        Row("h.{l}.attn.c_attn.weight", "layers/attn/q_DNH", _conv(0)),
        Row("h.{l}.attn.c_attn.weight", "layers/attn/k_DKH", _conv(1)),
        Row("h.{l}.attn.c_attn.weight", "layers/attn/v_DKH", _conv(2)),
        Row("h.{l}.attn.c_attn.bias", "layers/attn/q_bias_NH", Vector(0, 3)),
        Row("h.{l}.attn.c_attn.bias", "layers/attn/k_bias_KH", Vector(1, 3)),
        Row("h.{l}.attn.c_attn.bias", "layers/attn/v_bias_KH", Vector(2, 3)),
        *linear_rows("h.{l}.attn.c_proj", "layers/attn/o", "NHD", "D", Matrix(2, transposed=False)),
        *norm_rows("h.{l}.ln_2", "layers/mlp_norm"),
        *linear_rows("h.{l}.mlp.c_fc", "layers/mlp/up", "DF", "F", STORED),
        *linear_rows("h.{l}.mlp.c_proj", "layers/mlp/down", "FD", "D", STORED),
        *norm_rows("ln_f", "final_norm"),
        Row("lm_head.weight", "head/unembed_DV", LINEAR),
    ),
    tokens=TokenTables("wte.weight", "lm_head.weight", stand_ins=("lm_head.weight",)),
    # Old checkpoints contain the causal mask, a buffer.
    ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
)

GGUF_NAMES = NameTable(
    rows=(
        Row("token_embd.weight", "embed/tokens_VD", STORED),
        Row("position_embd.weight", "embed/positions_TD", STORED),
        *norm_rows("blk.{l}.attn_norm", "layers/attn_norm"),
        Row("blk.{l}.attn_qkv.weight", "layers/attn/q_DNH", Matrix(part=0, parts=3)),
        Row("blk.{l}.attn_qkv.weight", "layers/attn/k_DKH", Matrix(part=1, parts=3)),
        Row("blk.{l}.attn_qkv.weight", "layers/attn/v_DKH", Matrix(part=2, parts=3)),
        Row("blk.{l}.attn_qkv.bias", "layers/attn/q_bias_NH", Vector(0, 3)),
        Row("blk.{l}.attn_qkv.bias", "layers/attn/k_bias_KH", Vector(1, 3)),
        Row("blk.{l}.attn_qkv.bias", "layers/attn/v_bias_KH", Vector(2, 3)),
        *linear_rows("blk.{l}.attn_output", "layers/attn/o", "NHD", "D", Matrix(2)),
        *norm_rows("blk.{l}.ffn_norm", "layers/mlp_norm"),
        *linear_rows("blk.{l}.ffn_up", "layers/mlp/up", "DF", "F"),
        *linear_rows("blk.{l}.ffn_down", "layers/mlp/down", "FD", "D"),
        *norm_rows("output_norm", "final_norm"),
        Row("output.weight", "head/unembed_DV", LINEAR),
    ),
)
