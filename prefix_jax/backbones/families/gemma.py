"""The text models of Gemma 1, 2 and 3 (Gemma Team 2024, 2024 and 2025).

Gemma 1 is Llama with scaled embeddings, and with norm scales stored as their difference from 1.
Gemma 2 adds norms after attention and feed-forward, soft caps, and a sliding window in every second
layer. Gemma 3 adds norms of queries and keys, and has a sliding window with other rotary
frequencies in five of six layers. Only the text part of a multimodal `gemma3` checkpoint is read.
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
from prefix_jax.backbones.families.rope import read_rotary, read_rotary_of_layers
from prefix_jax.errors import BackboneError
from prefix_jax.nn.rotary import Rotary

# The defaults of transformers' configuration class, by `model_type`.
_COMMON: dict[str, Any] = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {
        **_COMMON,
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
    },
    "gemma2": {
        **_COMMON,
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": {
        **_COMMON,
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    "gemma3": {
        "tie_word_embeddings": True,
    },
}

_THETAS = {
    "full_attention": ("rope_theta", 1_000_000.0),
    "sliding_attention": ("rope_local_base_freq", 10_000.0),
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Reads a Hugging Face `config.json` of the Gemma family.

    Raises:
        BackboneError: the configuration has an unsupported variant.
    """
    model_type = config["model_type"]
    kind = "gemma3_text" if model_type == "gemma3" else model_type
    tied = complete(config, DEFAULTS[model_type])["tie_word_embeddings"]
    config = complete(config["text_config"] if model_type == "gemma3" else config, DEFAULTS[kind])
    if config.get("use_bidirectional_attention"):
        raise BackboneError(f"{model_type} with use_bidirectional_attention is not supported")
    if kind == "gemma3_text" and config["attn_logit_softcapping"] is not None:
        raise BackboneError("Gemma 3 with attn_logit_softcapping is not supported")
    L, D = config["num_hidden_layers"], config["hidden_size"]
    window, sliding = _windows(config, kind, L)
    rotary, sliding_rotary = _rotaries(config, kind)
    # A configuration of Gemma 1 may have keys of Gemma 2, which transformers ignores. The
    # multimodal model does not cap its logits, unlike the text model.
    newer = kind != "gemma"
    caps_logits = newer and model_type != "gemma3"
    attention_bias = config["attention_bias"]
    return Architecture(
        model_type=model_type,
        layers=L,
        d_model=D,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        d_ff=config["intermediate_size"],
        vocab=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        norm="rms_plus_one",
        epsilon=config["rms_norm_eps"],
        activation=config["hidden_activation"] if newer else _activation(config),
        gated=True,
        norm_at="around" if newer else "before",
        rotary=rotary,
        sliding_rotary=sliding_rotary,
        embed_scale=D**0.5,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        qk_norm=kind == "gemma3_text",
        attention_scale=config["query_pre_attn_scalar"] ** -0.5 if newer else None,
        attention_softcap=config["attn_logit_softcapping"] if newer else None,
        logit_softcap=config["final_logit_softcapping"] if caps_logits else None,
        window=window,
        sliding=sliding,
        tied=tied,
    )


def _activation(config: Mapping[str, Any]) -> str:
    # The first releases of Gemma 1 say "gelu" but use its tanh approximation.
    name = str(config["hidden_act"])
    return "gelu_pytorch_tanh" if name == "gelu" else name


def _windows(
    config: Mapping[str, Any], kind: str, layers: int
) -> tuple[int | None, tuple[bool, ...]]:
    """The size of the sliding window, and for every layer whether it has one."""
    if kind == "gemma":
        return None, ()
    kinds = layer_kinds(config, layers)
    if kinds is not None:
        return config["sliding_window"], tuple(kind == "sliding_attention" for kind in kinds)
    # The last layer of every period has no window. Gemma 2's period is fixed.
    period = config.get("sliding_window_pattern", 6) if kind == "gemma3_text" else 2
    return config["sliding_window"], tuple((layer + 1) % period != 0 for layer in range(layers))


def _rotaries(config: Mapping[str, Any], kind: str) -> tuple[Rotary, Rotary | None]:
    """The rotary frequencies of full and of sliding layers; None if they are the same."""
    if kind != "gemma3_text":
        return read_rotary(config), None
    rotaries = read_rotary_of_layers(config, _THETAS)
    return rotaries["full_attention"], rotaries["sliding_attention"]


def hf_names(arch: Architecture) -> NameTable:
    """The tensor names of a checkpoint in Hugging Face layout."""
    attention, mlp = "layers.{l}.self_attn", "layers.{l}.mlp"
    # Gemma 1 has no norms after attention and feed-forward, and another name for the second norm.
    names = {"mlp_norm": "post_attention_layernorm"}
    if arch.norm_at == "around":
        names = {
            "attn_out_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_out_norm": "post_feedforward_layernorm",
        }
    head = "language_model.lm_head" if arch.model_type == "gemma3" else "lm_head"
    return NameTable(
        prefix="language_model.model." if arch.model_type == "gemma3" else "model.",
        rows=(
            Row("embed_tokens.weight", "embed/tokens_VD", STORED),
            Row("layers.{l}.input_layernorm.weight", "layers/attn_norm/scale_D", VECTOR),
            *(
                Row(f"layers.{{l}}.{stored}.weight", f"layers/{ours}/scale_D", VECTOR)
                for ours, stored in names.items()
            ),
            *attention_rows(attention, "layers/attn"),
            Row(f"{attention}.q_norm.weight", "layers/attn/q_norm/scale_H", VECTOR),
            Row(f"{attention}.k_norm.weight", "layers/attn/k_norm/scale_H", VECTOR),
            Row(f"{mlp}.gate_proj.weight", "layers/mlp/gate_DF", LINEAR),
            Row(f"{mlp}.up_proj.weight", "layers/mlp/up_DF", LINEAR),
            Row(f"{mlp}.down_proj.weight", "layers/mlp/down_FD", LINEAR),
            Row("norm.weight", "final_norm/scale_D", VECTOR),
            Row(f"{head}.weight", "head/unembed_DV", LINEAR),
        ),
        tokens=TokenTables("embed_tokens.weight", f"{head}.weight", stand_ins=(f"{head}.weight",)),
        # Frequencies are computed from the configuration, and images are not supported.
        ignored=(
            r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
            r"(vision_tower|multi_modal_projector)\..*",
        ),
    )


_GGUF_NORM = Vector(excess=1.0)
GGUF_NAMES = NameTable(
    rows=(
        Row("token_embd.weight", "embed/tokens_VD", STORED),
        Row("blk.{l}.attn_norm.weight", "layers/attn_norm/scale_D", _GGUF_NORM),
        Row("blk.{l}.post_attention_norm.weight", "layers/attn_out_norm/scale_D", _GGUF_NORM),
        Row("blk.{l}.attn_q.weight", "layers/attn/q_DNH", LINEAR),
        Row("blk.{l}.attn_k.weight", "layers/attn/k_DKH", LINEAR),
        Row("blk.{l}.attn_v.weight", "layers/attn/v_DKH", LINEAR),
        Row("blk.{l}.attn_output.weight", "layers/attn/o_NHD", Matrix(2)),
        Row("blk.{l}.attn_q_norm.weight", "layers/attn/q_norm/scale_H", _GGUF_NORM),
        Row("blk.{l}.attn_k_norm.weight", "layers/attn/k_norm/scale_H", _GGUF_NORM),
        Row("blk.{l}.ffn_norm.weight", "layers/mlp_norm/scale_D", _GGUF_NORM),
        Row("blk.{l}.post_ffw_norm.weight", "layers/mlp_out_norm/scale_D", _GGUF_NORM),
        Row("blk.{l}.ffn_gate.weight", "layers/mlp/gate_DF", LINEAR),
        Row("blk.{l}.ffn_up.weight", "layers/mlp/up_DF", LINEAR),
        Row("blk.{l}.ffn_down.weight", "layers/mlp/down_FD", LINEAR),
        Row("output_norm.weight", "final_norm/scale_D", _GGUF_NORM),
        Row("output.weight", "head/unembed_DV", LINEAR),
    ),
)
