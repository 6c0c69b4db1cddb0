"""The Llama family: rotary positions, RMS norms, gated feed-forward networks, grouped queries.

It covers Llama 1 to 3 (Touvron et al. 2023), SmolLM, Mistral (which adds a sliding window), Qwen 2
(biases of queries, keys and values) and Qwen 3 (norms of queries and keys). The axis letters of
parameter names are explained in the docstring of `prefix_jax`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefix_jax.backbones.architecture import Architecture, layer_kinds
from prefix_jax.backbones.families.config import complete
from prefix_jax.backbones.families.names import (
    LINEAR,
    STORED,
    VECTOR,
    Matrix,
    NameTable,
    Row,
    TokenTables,
    Vector,
    attention_rows,
)
from prefix_jax.backbones.families.rope import read_rotary

# The defaults of transformers' configuration class, by `model_type`.
_COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        **_COMMON,
        "vocab_size": 32_000,
        "intermediate_size": 11_008,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mistral": {
        **_COMMON,
        "vocab_size": 32_000,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    "qwen2": {
        **_COMMON,
        "vocab_size": 151_936,
        "intermediate_size": 22_016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        **_COMMON,
        "vocab_size": 151_936,
        "intermediate_size": 22_016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32_768,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Reads a Hugging Face `config.json` of the Llama family.

    Raises:
        BackboneError: the configuration has an unsupported variant.
    """
    model_type = config["model_type"]
    config = complete(config, DEFAULTS[model_type])
    L, D, N = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
    # transformers ignores the key for Mistral, which has no biases, and for Qwen 2, which has some.
    attention_bias = model_type == "qwen2" or bool(config.get("attention_bias"))
    attention_bias = attention_bias and model_type != "mistral"
    window, sliding = _windows(config, L)
    return Architecture(
        model_type=model_type,
        layers=L,
        d_model=D,
        heads=N,
        kv_heads=config.get("num_key_value_heads") or N,
        head_dim=config.get("head_dim") or D // N,
        d_ff=config["intermediate_size"],
        vocab=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        norm="rms",
        epsilon=config["rms_norm_eps"],
        activation=config["hidden_act"],
        gated=True,
        rotary=read_rotary(config),
        qkv_bias=attention_bias,
        out_bias=attention_bias and model_type != "qwen2",
        mlp_bias=model_type == "llama" and config["mlp_bias"],
        qk_norm=model_type == "qwen3",
        window=window,
        sliding=sliding,
        tied=config["tie_word_embeddings"],
    )


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The size of the sliding window, and for every layer whether it has one."""
    window, model_type = config.get("sliding_window"), config["model_type"]
    # Llama has no window, even if a model that was converted to Llama has the key.
    if window is None or model_type == "llama":
        return None, ()
    # Qwen's window is off by default.
    if model_type != "mistral" and not config["use_sliding_window"]:
        return None, ()
    kinds = layer_kinds(config, layers)
    if kinds is not None:
        return window, tuple(kind == "sliding_attention" for kind in kinds)
    first = 0 if model_type == "mistral" else config["max_window_layers"]
    return window, tuple(layer >= first for layer in range(layers))


def hf_names(arch: Architecture) -> NameTable:
    """The tensor names of a checkpoint in Hugging Face layout."""
    return _HF_NAMES


_HF_NAMES = NameTable(
    prefix="model.",
    rows=(
        Row("embed_tokens.weight", "embed/tokens_VD", STORED),
        Row("layers.{l}.input_layernorm.weight", "layers/attn_norm/scale_D", VECTOR),
        *attention_rows("layers.{l}.self_attn", "layers/attn"),
        Row("layers.{l}.self_attn.q_norm.weight", "layers/attn/q_norm/scale_H", VECTOR),
        Row("layers.{l}.self_attn.k_norm.weight", "layers/attn/k_norm/scale_H", VECTOR),
        Row("layers.{l}.post_attention_layernorm.weight", "layers/mlp_norm/scale_D", VECTOR),
        Row("layers.{l}.mlp.gate_proj.weight", "layers/mlp/gate_DF", LINEAR),
        Row("layers.{l}.mlp.up_proj.weight", "layers/mlp/up_DF", LINEAR),
        Row("layers.{l}.mlp.down_proj.weight", "layers/mlp/down_FD", LINEAR),
        Row("layers.{l}.mlp.gate_proj.bias", "layers/mlp/gate_bias_F", VECTOR),
        Row("layers.{l}.mlp.up_proj.bias", "layers/mlp/up_bias_F", VECTOR),
        Row("layers.{l}.mlp.down_proj.bias", "layers/mlp/down_bias_D", VECTOR),
        Row("norm.weight", "final_norm/scale_D", VECTOR),
        Row("lm_head.weight", "head/unembed_DV", LINEAR),
    ),
    tokens=TokenTables("embed_tokens.weight", "lm_head.weight", stand_ins=("lm_head.weight",)),
    # Frequencies are computed from the configuration.
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)


def _gguf_names(interleaved: bool) -> NameTable:
    """The tensor names of a GGUF file.

    Args:
        interleaved: whether llama.cpp interleaves the halves of each head's rotary dimensions.
    """
    rotary, rotary_bias = Matrix(interleaved=interleaved), Vector(interleaved=interleaved)
    return NameTable(
        rows=(
            Row("token_embd.weight", "embed/tokens_VD", STORED),
            Row("blk.{l}.attn_norm.weight", "layers/attn_norm/scale_D", VECTOR),
            Row("blk.{l}.attn_q.weight", "layers/attn/q_DNH", rotary),
            Row("blk.{l}.attn_k.weight", "layers/attn/k_DKH", rotary),
            Row("blk.{l}.attn_v.weight", "layers/attn/v_DKH", LINEAR),
            Row("blk.{l}.attn_output.weight", "layers/attn/o_NHD", Matrix(2)),
            Row("blk.{l}.attn_q.bias", "layers/attn/q_bias_NH", rotary_bias),
            Row("blk.{l}.attn_k.bias", "layers/attn/k_bias_KH", rotary_bias),
            Row("blk.{l}.attn_v.bias", "layers/attn/v_bias_KH", VECTOR),
            Row("blk.{l}.attn_output.bias", "layers/attn/o_bias_D", VECTOR),
            Row("blk.{l}.attn_q_norm.weight", "layers/attn/q_norm/scale_H", VECTOR),
            Row("blk.{l}.attn_k_norm.weight", "layers/attn/k_norm/scale_H", VECTOR),
            Row("blk.{l}.ffn_norm.weight", "layers/mlp_norm/scale_D", VECTOR),
            Row("blk.{l}.ffn_gate.weight", "layers/mlp/gate_DF", LINEAR),
            Row("blk.{l}.ffn_up.weight", "layers/mlp/up_DF", LINEAR),
            Row("blk.{l}.ffn_down.weight", "layers/mlp/down_FD", LINEAR),
            Row("blk.{l}.ffn_gate.bias", "layers/mlp/gate_bias_F", VECTOR),
            Row("blk.{l}.ffn_up.bias", "layers/mlp/up_bias_F", VECTOR),
            Row("blk.{l}.ffn_down.bias", "layers/mlp/down_bias_D", VECTOR),
            Row("output_norm.weight", "final_norm/scale_D", VECTOR),
            Row("output.weight", "head/unembed_DV", LINEAR),
        ),
        # `GGUF.config` reads it as rotary scaling.
        ignored=(r"rope_freqs\.weight",),
    )


GGUF_NAMES = _gguf_names(interleaved=True)
# llama.cpp stores Qwen's rotary dimensions as Hugging Face does.
QWEN_GGUF_NAMES = _gguf_names(interleaved=False)
