"""A model small enough to train in a second: random weights, every byte a token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONFIG = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": True,
    "eos_token_id": 256,
}
_END = "</s>"


def write_model(directory: Path, *, seed: int = 0, **config: int) -> Path:
    """Writes a model into a new directory.

    Args:
        directory: where to.
        seed: of the weights: models of two seeds have one shape and two fingerprints.
        config: what differs from `CONFIG`.
    """
    directory.mkdir(parents=True)
    content = CONFIG | config
    (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")
    safetensors.numpy.save_file(_weights(content, seed), directory / "model.safetensors")
    _tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END})
    )
    return directory


def _weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key_value = D // config["num_attention_heads"] * config["num_key_value_heads"]

    def matrix(out: int, into: int, scale: float = 1.0) -> np.ndarray:
        return (rng.normal(size=(out, into)) * scale / np.sqrt(into)).astype(np.float32)

    # Large enough that no two tokens are almost equally likely.
    weights = {"model.embed_tokens.weight": matrix(V, D, 4), "model.norm.weight": np.ones(D)}
    for layer in range(config["num_hidden_layers"]):
        inner = {
            "self_attn.q_proj": matrix(D, D),
            "self_attn.k_proj": matrix(key_value, D),
            "self_attn.v_proj": matrix(key_value, D),
            "self_attn.o_proj": matrix(D, D),
            "mlp.gate_proj": matrix(F, D),
            "mlp.up_proj": matrix(F, D),
            "mlp.down_proj": matrix(D, F),
            "input_layernorm": np.ones(D),
            "post_attention_layernorm": np.ones(D),
        }
        weights |= {f"model.layers.{layer}.{name}.weight": x for name, x in inner.items()}
    return {name: x.astype(np.float32) for name, x in weights.items()}


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_END, special=True)])
    return tokenizer
