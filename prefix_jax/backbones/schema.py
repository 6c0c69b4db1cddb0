"""Types and ranges of the configuration keys that are read here, for every family.

A configuration is checked before a family computes with it, so that a wrong value is reported by
its key, and no family needs checks of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from prefix_jax.backbones.architecture import Epsilon
from prefix_jax.errors import BackboneError
from prefix_jax.nn.rotary import Theta
from prefix_jax.untrusted.values import Count, NonNegative, Positive, Range, Share, Size, require

# More than any checkpoint holds; lists with an entry per layer or token stay small.
Depth = Annotated[int, Range(1, 10_000)]
Width = Annotated[int, Range(1, 2**24)]
# Only some keys may name several tokens; the families refuse the others.
_Tokens = int | list[int] | None

_SCHEMA: dict[str, Any] = {
    # Sizes.
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
         "decoder_layers"),
        Depth,
    ),
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "n_embd", "d_model", "dim", "embedding_size",
         "intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim",
         "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads", "d_kv", "word_embed_proj_dim",
         "relative_attention_num_buckets", "relative_attention_max_distance"),
        Width,
    ),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "n_inner"), Width | None),
    "num_decoder_layers": Depth | None,
    "type_vocab_size": Count,
    # Positions.
    **dict.fromkeys(("max_position_embeddings", "n_positions"), Size),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_pattern", "original_max_position_embeddings"),
        Size | None,
    ),
    "max_window_layers": Count,
    "layer_types": list[str] | None,
    # Names of labels.
    "id2label": dict[str, Any] | None,
    # Rotary positions.
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "rotary_emb_base"), Theta),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), Positive),
    **dict.fromkeys(
        ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        NonNegative | None,
    ),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), Share | None),
    **dict.fromkeys(("rope_type", "type"), str),
    # Numbers.
    **dict.fromkeys(
        ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), Epsilon
    ),
    **dict.fromkeys(
        ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        Positive | None,
    ),
    # Names.
    **dict.fromkeys(
        ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn"),
        str | None,
    ),
    "feed_forward_proj": str,
    "position_embedding_type": str,
    # Flags.
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "enable_bias", "scale_embedding",
         "scale_decoder_outputs", "is_gated_act", "use_sliding_window", "use_parallel_residual",
         "do_layer_norm_before", "layer_norm_elementwise_affine", "_remove_final_layer_norm",
         "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "is_decoder",
         "add_cross_attention", "truncate"),
        bool,
    ),
    "use_bidirectional_attention": bool | None,
    # Tokens.
    **dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",
         "forced_bos_token_id", "forced_eos_token_id"),
        _Tokens,
    ),
}  # fmt: skip
_NESTED = ("text_config", "rope_parameters", "rope_scaling")


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Checks the keys of a configuration that are read here.

    Args:
        config: of Hugging Face's `config.json` or `generation_config.json`.
        where: its source, for messages.

    Raises:
        BackboneError: a value has the wrong type, is not finite, or is out of range.
    """
    for key, value in config.items():
        if key in _SCHEMA:
            require(value, _SCHEMA[key], f"{where}: {key}", BackboneError)
        elif key in _NESTED:
            require(value, dict[str, Any] | None, f"{where}: {key}", BackboneError)
            check_config(value or {}, f"{where}: {key}")
            for kind, inner in (value or {}).items():  # rope_parameters by kind of layer
                if isinstance(inner, Mapping) and key != "text_config":
                    check_config(inner, f"{where}: {key}.{kind}")
