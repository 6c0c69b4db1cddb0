"""Configurations of published models by name, so that a plan needs no model files.

They contain the parts of each model's `config.json` on the Hugging Face hub that affect the
computation. `tests/plan/test_presets.py` checks their parameter counts.
"""

from __future__ import annotations

import difflib
from typing import Any

from prefix_jax.errors import BackboneError

PREFIX = "preset:"


def preset(name: str) -> dict[str, Any]:
    """Returns the configuration of a published model.

    Raises:
        BackboneError: the name is unknown.
    """
    key = name.lower().removeprefix(PREFIX)
    if key not in PRESETS:
        near = difflib.get_close_matches(key, PRESETS, n=1)
        hint = f" did you mean {near[0]!r}?" if near else ""
        raise BackboneError(f"unknown preset {key!r};{hint} use one of {', '.join(PRESETS)}")
    return dict(PRESETS[key])


def _llama(D: int, F: int, L: int, N: int, K: int, **more: Any) -> dict[str, Any]:
    """Llama 3."""
    return {
        "model_type": "llama",
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "vocab_size": 128_256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        **more,
    }


def _long(factor: float) -> dict[str, Any]:
    """Long-context settings that Llama 3.1 and 3.2 add to Llama 3."""
    return {
        "max_position_embeddings": 131_072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


def _qwen3(D: int, F: int, L: int, N: int, tied: bool = False) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": tied,
    }


def _mistral(vocab: int, theta: float, window: int | None) -> dict[str, Any]:
    return {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": vocab,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
        "rope_theta": theta,
        "sliding_window": window,
        "tie_word_embeddings": False,
    }


def _gemma3(D: int, F: int, L: int, N: int, K: int, H: int, scalar: int) -> dict[str, Any]:
    """The text model; the published files omit the defaults of transformers."""
    return {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": D,
            "intermediate_size": F,
            "num_hidden_layers": L,
            "num_attention_heads": N,
            "num_key_value_heads": K,
            "head_dim": H,
            "query_pre_attn_scalar": scalar,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    }


def _t5(D: int, F: int, L: int, N: int) -> dict[str, Any]:
    """T5 1.1."""
    return {
        "model_type": "t5",
        "d_model": D,
        "d_kv": 64,
        "d_ff": F,
        "num_layers": L,
        "num_decoder_layers": L,
        "num_heads": N,
        "vocab_size": 32_128,
        "relative_attention_num_buckets": 32,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    }


def _gpt2(D: int, L: int, N: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": D,
        "n_layer": L,
        "n_head": N,
        "n_positions": 1024,
        "vocab_size": 50_257,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
    }


def _smollm2(D: int, F: int, L: int, N: int, K: int, theta: float) -> dict[str, Any]:
    return _llama(
        D, F, L, N, K, vocab_size=49_152, rope_theta=theta, tie_word_embeddings=True
    )  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "llama-3-8b": _llama(4096, 14_336, 32, 32, 8),
    "llama-3-70b": _llama(8192, 28_672, 80, 64, 8),
    "llama-3.1-8b": _llama(4096, 14_336, 32, 32, 8, **_long(8.0)),
    "llama-3.1-70b": _llama(8192, 28_672, 80, 64, 8, **_long(8.0)),
    "llama-3.2-1b": _llama(
        2048, 8192, 16, 32, 8, head_dim=64, **_long(32.0) | {"tie_word_embeddings": True}
    ),
    "llama-3.2-3b": _llama(
        3072, 8192, 28, 24, 8, head_dim=128, **_long(32.0) | {"tie_word_embeddings": True}
    ),
    "gemma-3-4b": _gemma3(2560, 10_240, 34, 8, 4, 256, 256),
    "gemma-3-12b": _gemma3(3840, 15_360, 48, 16, 8, 256, 256),
    "gemma-3-27b": _gemma3(5376, 21_504, 62, 32, 16, 128, 168),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64),
    "mistral-7b": _mistral(32_768, 1_000_000.0, None),
    "mistral-7b-v0.1": _mistral(32_000, 10_000.0, 4096),
    "t5-large": _t5(1024, 2816, 24, 16),
    "t5-xl": _t5(2048, 5120, 24, 32),
    "t5-xxl": _t5(4096, 10_240, 24, 64),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, 100_000.0),
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5, 100_000.0),
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, 130_000.0),
}
