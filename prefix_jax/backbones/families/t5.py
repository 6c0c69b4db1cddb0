"""T5 (Raffel et al. 2020), T5 1.1, Flan-T5 and mT5: relative positions, attention without scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from prefix_jax.backbones.architecture import UNLIMITED, Architecture, encoder_decoder
from prefix_jax.backbones.families.defaults import DEFAULTS, complete
from prefix_jax.backbones.families.names import (
    LINEAR,
    STORED,
    VECTOR,
    Matrix,
    NameTable,
    Row,
    TokenTables,
)
from prefix_jax.errors import BackboneError
from prefix_jax.nn.relative import Relative

# umT5 has relative positions of its own in every layer, and is not among them.
MODEL_TYPES = ("t5", "mt5")

_SHARED, _HEAD = "shared.weight", "lm_head.weight"
_ENCODER, _DECODER = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Reads a Hugging Face `config.json` of T5 or mT5.

    Raises:
        BackboneError: its buckets of relative positions are not computed as transformers does.
    """
    model_type = config["model_type"]
    # The decoder is as deep as the encoder by its usual name, whatever another spelling says.
    usual_layers = config.get("num_layers", DEFAULTS[model_type]["num_layers"])
    config = complete(config, model_type)
    D, projection = config["d_model"], config["feed_forward_proj"]
    # "gated-gelu" came first and means the approximate one. transformers writes down what it made
    # of the projection's name, and that wins.
    usual = "gelu_new" if projection == "gated-gelu" else projection.split("-")[-1]
    # The original T5 scales what its tied head reads; mT5 never does. transformers 5 writes that
    # down, and ties every T5 whose checkpoint has no head; before it, one stood for the other.
    tied = config.get("tie_word_embeddings") is not False
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
        epsilon=config["layer_norm_epsilon"],
        activation=config.get("dense_act_fn", usual),
        gated=config.get("is_gated_act", projection.split("-")[0] == "gated"),
        causal=False,
        relative=_relative(config),
        attention_scale=1.0,
    )
    assert encoder.relative is not None
    decoder = dataclasses.replace(
        encoder,
        layers=config.get("num_decoder_layers") or usual_layers,
        causal=True,
        relative=dataclasses.replace(encoder.relative, both_ways=False),
        tied=tied,
        head_scale=D**-0.5 if scaled else None,
    )
    return encoder_decoder(encoder, decoder, config, start="pad_token_id")


def _relative(config: Mapping[str, Any]) -> Relative:
    """The encoder's relative positions."""
    buckets = config["relative_attention_num_buckets"]
    farthest = config["relative_attention_max_distance"]
    if buckets < 4:
        raise BackboneError(f"relative_attention_num_buckets must be at least 4, got {buckets}")
    # Up to half of a decoder's buckets hold exact distances; the rest share a logarithmic range
    # that ends at the greatest distance, and for which transformers has no formula if it is empty.
    if farthest <= buckets // 2:
        raise BackboneError(
            f"relative_attention_max_distance is {farthest}; with "
            f"relative_attention_num_buckets {buckets} it must be more than {buckets // 2}"
        )
    return Relative(buckets, farthest, both_ways=True)


def as_stored(arch: Architecture, stored: Collection[str]) -> Architecture:
    """The architecture of a checkpoint: a head that is not stored is tied, whatever the
    configuration says."""
    return dataclasses.replace(arch, tied=True)


def hf_names(arch: Architecture) -> NameTable:
    """The names of the weights in a checkpoint of Hugging Face layout."""
    encoder = _stack("encoder", "encoder/", arch.gated, ("SelfAttention", "DenseReluDense"))
    decoder = _stack(
        "decoder", "", arch.gated, ("SelfAttention", "EncDecAttention", "DenseReluDense")
    )
    return NameTable(
        rows=(
            Row(_SHARED, "embed/tokens_VD", STORED),
            Row(_ENCODER, "encoder/embed/tokens_VD", STORED),
            *encoder,
            *decoder,
            Row(_HEAD, "head/unembed_DV", LINEAR),
        ),
        tokens=TokenTables(_SHARED, _HEAD, _ENCODER, _DECODER, (_ENCODER, _DECODER, _HEAD)),
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
