"""Types and ranges of the configuration keys that any family reads.

A configuration is checked before a family computes with it, so that a wrong value is reported by
its key, and no family needs checks of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from prefix_jax.errors import BackboneError
from prefix_jax.validation import (
    Count,
    Interval,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Probability,
    Share,
    require,
)

# Larger than any checkpoint, and small enough for lists with an entry per layer or token.
Depth = Annotated[int, Interval(ge=1, le=10_000)]
Width = Annotated[int, Interval(ge=1, le=2**24)]

_KEYS: tuple[tuple[Any, str], ...] = (
    (Depth, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"),
    (Depth | None, "num_decoder_layers"),
    (Width, "vocab_size hidden_size n_embd d_model dim d_kv embedding_size"),
    (Width, "intermediate_size ffn_dim d_ff hidden_dim encoder_ffn_dim decoder_ffn_dim"),
    (Width, "num_attention_heads n_head n_heads num_heads"),
    (Width, "encoder_attention_heads decoder_attention_heads"),
    (Width, "relative_attention_num_buckets relative_attention_max_distance"),
    (Width | None, "num_key_value_heads head_dim n_inner word_embed_proj_dim"),
    (Count, "type_vocab_size max_window_layers"),
    (PositiveInt, "max_position_embeddings n_positions"),
    (PositiveInt | None, "sliding_window sliding_window_pattern original_max_position_embeddings"),
    (Probability, "rms_norm_eps layer_norm_eps layer_norm_epsilon"),
    (PositiveFloat | None, "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping"),
    (PositiveFloat, "rope_theta rope_local_base_freq rotary_emb_base"),
    (Share | None, "partial_rotary_factor rotary_pct"),
    (PositiveFloat, "low_freq_factor high_freq_factor"),
    (NonNegativeFloat | None, "factor attention_factor beta_fast beta_slow mscale mscale_all_dim"),
    (str, "rope_type type feed_forward_proj position_embedding_type"),
    (str | None, "hidden_act hidden_activation activation_function activation dense_act_fn"),
    (list[str] | None, "layer_types"),
    (dict[str, Any] | None, "id2label text_config rope_parameters rope_scaling"),
    (bool, "tie_word_embeddings attention_bias mlp_bias enable_bias is_gated_act truncate"),
    (bool, "scale_embedding scale_decoder_outputs _remove_final_layer_norm"),
    (bool, "scale_attn_weights scale_attn_by_inverse_layer_idx use_sliding_window"),
    (bool, "do_layer_norm_before layer_norm_elementwise_affine use_parallel_residual"),
    (bool, "is_decoder add_cross_attention"),
    (bool | None, "use_bidirectional_attention"),
    # Only some of these may be lists of tokens; the families reject the others.
    (int | list[int] | None, "bos_token_id eos_token_id pad_token_id decoder_start_token_id"),
    (int | list[int] | None, "forced_bos_token_id forced_eos_token_id"),
)
_SCHEMA = {key: hint for hint, keys in _KEYS for key in keys.split()}
_NESTED = ("text_config", "rope_parameters", "rope_scaling")
# Gemma 3 has rope_parameters for each of these.
_BY_LAYER = ("full_attention", "sliding_attention")


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Checks the keys that any family reads.

    Args:
        config: content of a Hugging Face `config.json` or `generation_config.json`.
        where: its origin, for messages.

    Raises:
        BackboneError: a value has the wrong type, is not finite, or is out of range.
    """
    for key, value in config.items():
        if key in _SCHEMA:
            require(value, _SCHEMA[key], f"{where}: {key}", BackboneError)
        if isinstance(value, Mapping) and key in (*_NESTED, *_BY_LAYER):
            check_config(value, f"{where}: {key}")
