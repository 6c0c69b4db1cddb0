"""T5 (Raffel et al. 2020), T5 1.1, Flan-T5 and mT5: relative positions, unscaled attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from prefix_jax.backbones.architecture import UNLIMITED, Architecture, encoder_decoder
from prefix_jax.backbones.families.config import complete
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

# umT5 is not supported: each of its layers has its own relative positions.
# The defaults of transformers' configuration class, by `model_type`.
_COMMON: dict[str, Any] = {
    "d_model": 512,
    "d_kv": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "t5": {
        **_COMMON,
        "vocab_size": 32_128,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "feed_forward_proj": "relu",
    },
    "mt5": {
        **_COMMON,
        "vocab_size": 250_112,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
    },
}
SPELLINGS: dict[str, dict[str, str]] = {
    "t5": {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
    "mt5": {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
}

_SHARED, _HEAD = "shared.weight", "lm_head.weight"
_ENCODER, _DECODER = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Reads a Hugging Face `config.json` of T5 or mT5.

    Raises:
        BackboneError: transformers has no formula for its buckets of relative positions.
    """
    model_type = config["model_type"]
    # By default the decoder has `num_layers` layers, even if another spelling gives the encoder's.
    usual_layers = config.get("num_layers", DEFAULTS[model_type]["num_layers"])
    config = complete(config, DEFAULTS[model_type], SPELLINGS[model_type])
    D, projection = config["d_model"], config["feed_forward_proj"]
    # "gated-gelu" is the older name and means the approximation. transformers also stores how it
    # parsed the projection's name (dense_act_fn, is_gated_act), which takes precedence.
    usual = "gelu_new" if projection == "gated-gelu" else projection.split("-")[-1]
    # The original T5 scales the input of its tied head; mT5 never does. transformers 5 stores this
    # (scale_decoder_outputs) and ties every T5 whose checkpoint has no head. Older versions scale
    # exactly if the head is tied.
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
    # Half of a decoder's buckets hold exact distances. The rest share a logarithmic range up to
    # the maximum distance, for which transformers has no formula if it is empty.
    if farthest <= buckets // 2:
        raise BackboneError(
            f"relative_attention_max_distance is {farthest}; with "
            f"relative_attention_num_buckets {buckets} it must be more than {buckets // 2}"
        )
    return Relative(buckets, farthest, both_ways=True)


def as_stored(arch: Architecture, stored: Collection[str]) -> Architecture:
    """Ties the head; `resolve_ties` unties it if the checkpoint stores another one. transformers
    ties a head that is not stored even if the configuration does not."""
    return dataclasses.replace(arch, tied=True)


def hf_names(arch: Architecture) -> NameTable:
    """The tensor names of a checkpoint in Hugging Face layout."""
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
        # Unused, in older checkpoints.
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
