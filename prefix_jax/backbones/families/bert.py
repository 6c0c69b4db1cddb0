"""The BERT family of encoders: learned positions, norms after each sublayer, biases.

It covers BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019: one token type, positions that start
after the padding's), XLM-R (Conneau et al. 2020: as RoBERTa), ELECTRA (Clark et al. 2020: narrower
embeddings with a projection) and DistilBERT (Sanh et al. 2019: no token types, other names). Heads
for pretraining and for tasks are ignored, except for BERT's pooler, with which its task heads
begin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.families.config import complete
from prefix_jax.backbones.families.names import (
    LINEAR,
    STORED,
    VECTOR,
    Matrix,
    NameTable,
    Row,
    Vector,
)
from prefix_jax.errors import BackboneError

_ROBERTA = ("roberta", "xlm-roberta")

# The defaults of transformers' configuration class, by `model_type`.
_COMMON: dict[str, Any] = {
    "num_hidden_layers": 12,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": {
        **_COMMON,
        "vocab_size": 30_522,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "roberta": {
        **_COMMON,
        "vocab_size": 50_265,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "pad_token_id": 1,
    },
    "xlm-roberta": {
        **_COMMON,
        "vocab_size": 30_522,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "pad_token_id": 1,
    },
    "electra": {
        **_COMMON,
        "vocab_size": 30_522,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "embedding_size": 128,
    },
    "distilbert": {
        "vocab_size": 30_522,
        "max_position_embeddings": 512,
        "n_layers": 6,
        "n_heads": 12,
        "dim": 768,
        "hidden_dim": 3072,
        "activation": "gelu",
    },
}
SPELLINGS: dict[str, dict[str, str]] = {
    "distilbert": {
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    },
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Reads a Hugging Face `config.json` of an encoder.

    Raises:
        BackboneError: the configuration has an unsupported variant.
    """
    model_type = config["model_type"]
    config = complete(config, DEFAULTS[model_type], SPELLINGS.get(model_type, {}))
    for flag, usual in (
        ("is_decoder", False),
        ("add_cross_attention", False),
        ("position_embedding_type", "absolute"),
    ):
        if config.get(flag, usual) != usual:
            raise BackboneError(
                f"{model_type} with {flag}={config[flag]} is not supported; expected an encoder "
                "with absolute positions"
            )
    distilled = model_type == "distilbert"
    D = config["dim" if distilled else "hidden_size"]
    N = config["n_heads" if distilled else "num_attention_heads"]
    E = config["embedding_size"] if model_type == "electra" else D
    # RoBERTa's positions start after the padding's row, which is never read.
    offset = config["pad_token_id"] + 1 if model_type in _ROBERTA else 0
    return Architecture(
        model_type=model_type,
        layers=config["n_layers" if distilled else "num_hidden_layers"],
        d_model=D,
        heads=N,
        kv_heads=N,
        head_dim=D // N,
        d_ff=config["hidden_dim" if distilled else "intermediate_size"],
        vocab=config["vocab_size"],
        max_positions=config["max_position_embeddings"] - offset,
        norm="layer",
        epsilon=1e-12 if distilled else config["layer_norm_eps"],
        activation=config["activation" if distilled else "hidden_act"],
        gated=False,
        causal=False,
        norm_at="after",
        final_norm=False,
        positions=config["max_position_embeddings"],
        position_offset=offset,
        token_types=0 if distilled else config["type_vocab_size"],
        embed_dim=None if E == D else E,
        embed_norm=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def as_stored(arch: Architecture, stored: Collection[str]) -> Architecture:
    """Adds a pooler if the checkpoint has one, which the configuration does not say."""
    plain = hf_names(arch).plain
    pooler = any(plain(name) == "pooler.dense.weight" for name in stored)
    return dataclasses.replace(arch, pooler=pooler)


def hf_names(arch: Architecture) -> NameTable:
    """The tensor names of a checkpoint in Hugging Face layout."""
    return NameTable(
        prefix="roberta." if arch.model_type in _ROBERTA else f"{arch.model_type}.",
        rows=_AROUND + _layer(arch.model_type == "distilbert"),
        # Buffers, and heads for pretraining and for tasks.
        ignored=(
            r"embeddings\.(position|token_type)_ids",
            r"(cls|lm_head|discriminator_predictions|generator_predictions|generator_lm_head"
            r"|vocab_transform|vocab_layer_norm|vocab_projector"
            r"|classifier|pre_classifier|qa_outputs|score|sequence_summary)\..*",
        ),
        # Names in the first checkpoints of BERT.
        spellings={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    )


def _pair(name: str, weight: str, bias: str, storage: Matrix | Vector = LINEAR) -> tuple[Row, Row]:
    return Row(f"{name}.weight", weight, storage), Row(f"{name}.bias", bias, VECTOR)


_AROUND = (
    Row("embeddings.word_embeddings.weight", "embed/tokens_VD", STORED),
    Row("embeddings.position_embeddings.weight", "embed/positions_TD", STORED),
    Row("embeddings.token_type_embeddings.weight", "embed/segments_XD", STORED),
    *_pair("embeddings.LayerNorm", "embed/norm/scale_D", "embed/norm/bias_D", VECTOR),
    *_pair("embeddings_project", "embed/project_ED", "embed/project_bias_D"),
    *_pair("pooler.dense", "pooler/weight_DD", "pooler/bias_D"),
)
# The parts of a layer: BERT's name, DistilBERT's name, our weight, our bias, and the storage.
_PARTS = (
    ("attention.self.query", "attention.q_lin", "attn/q_DNH", "attn/q_bias_NH", LINEAR),
    ("attention.self.key", "attention.k_lin", "attn/k_DKH", "attn/k_bias_KH", LINEAR),
    ("attention.self.value", "attention.v_lin", "attn/v_DKH", "attn/v_bias_KH", LINEAR),
    ("attention.output.dense", "attention.out_lin", "attn/o_NHD", "attn/o_bias_D", Matrix(2)),
    (
        "attention.output.LayerNorm",
        "sa_layer_norm",
        "attn_norm/scale_D",
        "attn_norm/bias_D",
        VECTOR,
    ),
    ("intermediate.dense", "ffn.lin1", "mlp/up_DF", "mlp/up_bias_F", LINEAR),
    ("output.dense", "ffn.lin2", "mlp/down_FD", "mlp/down_bias_D", LINEAR),
    ("output.LayerNorm", "output_layer_norm", "mlp_norm/scale_D", "mlp_norm/bias_D", VECTOR),
)


def _layer(distilled: bool) -> tuple[Row, ...]:
    """The rows of one layer."""
    stem = "transformer.layer.{l}" if distilled else "encoder.layer.{l}"
    return tuple(
        row
        for bert, distilbert, weight, bias, storage in _PARTS
        for row in _pair(
            f"{stem}.{distilbert if distilled else bert}",
            f"layers/{weight}",
            f"layers/{bias}",
            storage,
        )
    )
