"""T5 (Raffel et al. 2020), T5 1.1, Flan-T5 and mT5: relative positions, attention without scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from prefix_jax.backbones.architecture import UNLIMITED, Architecture, encoder_decoder
from prefix_jax.backbones.names import LINEAR, STORED, VECTOR, Matrix, NameTable, Row
from prefix_jax.nn.relative import Relative

# umT5 has relative positions of its own in every layer, and is not among them.
MODEL_TYPES = ("t5", "mt5")

_HEAD = "lm_head.weight"


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Reads a Hugging Face `config.json` of T5 or mT5."""
    model_type, D = config["model_type"], config["d_model"]
    projection = config.get("feed_forward_proj", "relu" if model_type == "t5" else "gated-gelu")
    # "gated-gelu" came first and means the approximate one.
    activation = "gelu_new" if projection == "gated-gelu" else projection.split("-")[-1]
    tied = config.get("tie_word_embeddings") is not False
    # The original T5 scales what its tied head reads; mT5 never does. transformers 5 writes that
    # down, and every T5 as tied; before it, one stood for the other.
    scaled = model_type == "t5" and config.get("scale_decoder_outputs", tied)
    encoder = Architecture(
        model_type=model_type,
        layers=config["num_layers"],
        d_model=D,
        heads=config["num_heads"],
        kv_heads=config["num_heads"],
        head_dim=config["d_kv"],
        d_ff=config["d_ff"],
        vocab=config["vocab_size"],
        max_positions=UNLIMITED,
        norm="rms",
        epsilon=config.get("layer_norm_epsilon", 1e-6),
        activation=activation,
        gated=projection.startswith("gated"),
        causal=False,
        relative=Relative(
            config.get("relative_attention_num_buckets", 32),
            config.get("relative_attention_max_distance", 128),
            both_ways=True,
        ),
        attention_scale=1.0,
    )
    assert encoder.relative is not None
    decoder = dataclasses.replace(
        encoder,
        layers=config.get("num_decoder_layers") or encoder.layers,
        causal=True,
        relative=dataclasses.replace(encoder.relative, both_ways=False),
        tied=tied,
        head_scale=D**-0.5 if scaled else None,
    )
    return encoder_decoder(encoder, decoder, config, start="pad_token_id")


def as_stored(arch: Architecture, stored: Collection[str]) -> Architecture:
    """The architecture with the head that a checkpoint of tensors of these names has: configs
    that transformers 5 wrote call every head tied."""
    return dataclasses.replace(arch, tied=_HEAD not in stored)


def hf_names(arch: Architecture) -> NameTable:
    """The names of the weights in a checkpoint of Hugging Face layout."""
    encoder = _stack("encoder", "encoder/", arch.gated, ("SelfAttention", "DenseReluDense"))
    decoder = _stack(
        "decoder", "", arch.gated, ("SelfAttention", "EncDecAttention", "DenseReluDense")
    )
    return NameTable(
        rows=(
            Row("shared.weight", "embed/tokens_VD", STORED),
            *encoder,
            *decoder,
            Row(_HEAD, "head/unembed_DV", LINEAR),
        ),
        aliases=dict.fromkeys(
            ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"], "shared.weight"
        ),
        # Older checkpoints have one that was never used.
        ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    )


def _stack(name: str, path: str, gated: bool, sublayers: tuple[str, ...]) -> list[Row]:
    """The rows of an encoder or a decoder."""
    relative = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rows = [
        Row(relative, f"{path}relative_RN", STORED),
        Row(f"{name}.final_layer_norm.weight", f"{path}final_norm/scale_D", VECTOR),
    ]
    up = {"wi_0": "gate_DF", "wi_1": "up_DF"} if gated else {"wi": "up_DF"}
    matrices: dict[str, tuple[str, dict[str, str]]] = {
        "SelfAttention": ("attn", _ATTENTION),
        "EncDecAttention": ("cross", _ATTENTION),
        "DenseReluDense": ("mlp", {**up, "wo": "down_FD"}),
    }
    for index, sublayer in enumerate(sublayers):
        ours, parts = matrices[sublayer]
        theirs = f"{name}.block.{{l}}.layer.{index}"
        rows.append(Row(f"{theirs}.layer_norm.weight", f"{path}layers/{ours}_norm/scale_D", VECTOR))
        rows += [
            Row(
                f"{theirs}.{sublayer}.{part}.weight",
                f"{path}layers/{ours}/{parameter}",
                Matrix(2) if parameter == "o_NHD" else LINEAR,
            )
            for part, parameter in parts.items()
        ]
    return rows


_ATTENTION = {"q": "q_DNH", "k": "k_DKH", "v": "v_DKH", "o": "o_NHD"}
