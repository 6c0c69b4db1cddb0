"""Models small enough to train in a second: random weights, tiny vocabularies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.families import bart, t5

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
_END, _PAD, _BEGIN = "</s>", "<pad>", "<s>"
_BYTES = pre_tokenizers.ByteLevel.alphabet()


def write_model(directory: Path, *, seed: int = 0, **config: Any) -> Path:
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
    _tokenizer([_END]).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END})
    )
    return directory


def write_ascii_tokenizer(directory: Path) -> None:
    """Writes a tokenizer with 96 tokens, printable ASCII and `</s>`, into a model's directory."""
    tokenizer = Tokenizer(models.BPE({chr(32 + i): i for i in range(95)}, []))
    tokenizer.add_special_tokens([AddedToken(_END, special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END})
    )


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


def _tokenizer(special: list[str]) -> Tokenizer:
    alphabet = sorted(_BYTES)
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return tokenizer


def write_gguf(
    file: Path, edit: Callable[[str, Any], Any] = lambda name, value: value, *, seed: int = 0
) -> Path:
    """Writes a GGUF file of a tiny llama with a byte-level tokenizer.

    Args:
        file: where to.
        edit: called with the name and the value of each metadata key; returns the value to write.
        seed: of the weights.
    """
    alphabet = sorted(_BYTES)
    tokens = [*alphabet, "ab", _END]
    normal, control = 1, 3  # gguf.TokenType
    content = CONFIG | {"vocab_size": len(tokens)}
    metadata: dict[str, Any] = {
        "llama.block_count": content["num_hidden_layers"],
        "llama.context_length": content["max_position_embeddings"],
        "llama.embedding_length": content["hidden_size"],
        "llama.feed_forward_length": content["intermediate_size"],
        "llama.attention.head_count": content["num_attention_heads"],
        "llama.attention.head_count_kv": content["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": content["rms_norm_eps"],
        "llama.rope.freq_base": content["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [normal] * (len(tokens) - 1) + [control],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in metadata.items():
        _add_metadata(writer, name, edit(name, value))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, content["num_hidden_layers"])
    for name, x in _weights(content, seed).items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_metadata(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(name, value)
    elif isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    else:
        writer.add_string(name, value)


# Encoders of the kinds of BERT and RoBERTa.

ENCODER_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_norm_eps": 1e-12,
}
_WORDS = "the a good bad film was is not very great awful plot who where paris london".split()
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'-"


def write_encoder(directory: Path, kind: str = "bert", *, seed: int = 0, **config: int) -> Path:
    """Writes an encoder with its pooler into a new directory.

    Args:
        directory: where to.
        kind: "bert", whose WordPiece knows a few words and every letter, or "roberta", to whose
            tokenizer every byte is a token.
        seed: of the weights.
        config: what differs from `ENCODER_CONFIG`.
    """
    directory.mkdir(parents=True)
    tokenizer, special = _bert_tokenizer() if kind == "bert" else _roberta_tokenizer()
    content = {"model_type": kind, "vocab_size": tokenizer.get_vocab_size(), **ENCODER_CONFIG}
    if kind == "bert":
        content |= {"max_position_embeddings": 96, "type_vocab_size": 2, "pad_token_id": 0}
    else:
        content |= {"max_position_embeddings": 98, "type_vocab_size": 1, "pad_token_id": 1}
    content |= config
    (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")
    weights = {f"{kind}.{name}": x for name, x in _encoder_weights(content, seed).items()}
    safetensors.numpy.save_file(weights, directory / "model.safetensors")
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    return directory


def _encoder_weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    D, F = config["hidden_size"], config["intermediate_size"]
    weights: dict[str, np.ndarray] = {}

    def linear(name: str, out: int, into: int) -> None:
        weights[f"{name}.weight"] = rng.normal(size=(out, into)) / np.sqrt(into)
        weights[f"{name}.bias"] = rng.normal(size=out) / 10

    def norm(name: str) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = np.ones(D), np.zeros(D)

    for table, rows in (
        ("word", config["vocab_size"]),
        ("position", config["max_position_embeddings"]),
        ("token_type", config["type_vocab_size"]),
    ):
        weights[f"embeddings.{table}_embeddings.weight"] = rng.normal(size=(rows, D))
    norm("embeddings.LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"encoder.layer.{layer}.attention.{part}", D, D)
        norm(f"encoder.layer.{layer}.attention.output.LayerNorm")
        linear(f"encoder.layer.{layer}.intermediate.dense", F, D)
        linear(f"encoder.layer.{layer}.output.dense", D, F)
        norm(f"encoder.layer.{layer}.output.LayerNorm")
    linear("pooler.dense", D, D)
    return {name: x.astype(np.float32) for name, x in weights.items()}


def _bert_tokenizer() -> tuple[Tokenizer, dict[str, str]]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *_LETTERS, *(f"##{letter}" for letter in _LETTERS), *_WORDS]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    names = ("pad", "unk", "cls", "sep", "mask")
    roles = {f"{name}_token": token for name, token in zip(names, special, strict=True)}
    return tokenizer, {"tokenizer_class": "BertTokenizer", **roles}


def _roberta_tokenizer() -> tuple[Tokenizer, dict[str, str]]:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {piece: i for i, piece in enumerate([*special, *sorted(_BYTES)])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    names = ("bos", "pad", "eos", "unk", "mask")
    roles = {f"{name}_token": token for name, token in zip(names, special, strict=True)}
    roles |= {"cls_token": "<s>", "sep_token": "</s>"}
    return tokenizer, {"tokenizer_class": "RobertaTokenizer", **roles}


# Encoder-decoders.

# The encoder is deeper than the decoder, and the head dimension is larger than D / N.
T5_CONFIG = {
    "model_type": "t5",
    "vocab_size": 258,
    "d_model": 32,
    "d_kv": 10,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "is_encoder_decoder": True,
    "eos_token_id": 256,
    "pad_token_id": 257,
    "decoder_start_token_id": 257,
}
BART_CONFIG = {
    "model_type": "bart",
    "vocab_size": 259,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 256,
    "scale_embedding": False,
    "is_encoder_decoder": True,
    "eos_token_id": 256,
    "pad_token_id": 257,
    "bos_token_id": 258,
    "decoder_start_token_id": 256,
    "forced_bos_token_id": 258,
    "forced_eos_token_id": 256,
}


def write_t5(directory: Path, *, seed: int = 0, **config: Any) -> Path:
    """Writes a T5 into a new directory; its tokenizer ends texts with `</s>`, as T5's does.

    Args:
        directory: where to.
        seed: of the weights.
        config: what differs from `T5_CONFIG`.
    """
    return _write_encoder_decoder(
        directory, t5, T5_CONFIG | config, seed, [_END, _PAD], f"$A {_END}"
    )


def write_bart(directory: Path, *, seed: int = 0, **config: Any) -> Path:
    """Writes a BART into a new directory; its tokenizer frames texts with `<s>` and `</s>`.

    Args:
        directory: where to.
        seed: of the weights.
        config: what differs from `BART_CONFIG`.
    """
    return _write_encoder_decoder(
        directory, bart, BART_CONFIG | config, seed, [_END, _PAD, _BEGIN], f"{_BEGIN} $A {_END}"
    )


def _write_encoder_decoder(
    directory: Path, family: ModuleType, config: dict, seed: int, special: list[str], text: str
) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    arch = family.architecture(config)
    rows = {row.path: row for row in family.hf_names(arch).rows}
    rng = np.random.default_rng(seed)
    weights = {}
    shapes = jax.eval_shape(Backbone(arch).init, jax.random.key(0))
    for path, leaf in flatten_dict(shapes, sep="/").items():
        stacked = "layers/" in path
        for layer in range(leaf.shape[0] if stacked else 1):
            shape = rows[path].storage.stored(leaf.shape[stacked:])
            x = rng.normal(size=shape) / np.sqrt(shape[-1])
            # Embeddings are large, so that no two tokens are almost equally likely.
            x = 1 + x if path.endswith("scale_D") else 4 * x if "tokens" in path else x
            weights[rows[path].name.format(l=layer)] = x.astype(np.float32)
    safetensors.numpy.save_file(weights, directory / "model.safetensors")
    tokenizer = _tokenizer(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=text,
        pair=f"{text} {text}".replace("$A", "$B").replace("$B", "$A", 1),
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in special],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    roles = dict(zip(("eos_token", "pad_token", "bos_token"), special, strict=False))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | roles)
    )
    return directory
