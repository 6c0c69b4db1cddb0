"""Compares checkpoints and configurations in unusual spellings with transformers.

Named variants are regression tests. Random draws mix every family's ties, stored tables, rotary
keys, soft caps, windows, activations and omitted keys; each one is equal or refused.

Runs only under `make parity`, whose environment has torch and transformers. More draws, or
others: PREFIX_JAX_DRAWS=300 PREFIX_JAX_SEED=1000 .venv-parity/bin/python -m pytest
tests/parity/test_live_configs.py
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.errors import BackboneError
from prefix_jax.nn.activations import _ACTIVATIONS
from prefix_jax.nn.attention.mask import TokenLayout

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

DRAWS = int(os.environ.get("PREFIX_JAX_DRAWS", "40"))
FIRST_SEED = int(os.environ.get("PREFIX_JAX_SEED", "0"))
LIMIT = 1e-4  # relative to transformers' largest value

ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
ENCODER_DECODERS = ("t5", "mt5", "bart")
ROTARY_DECODERS = ("llama", "mistral", "qwen2", "qwen3")
DECODERS = ("gpt2", "opt", "gpt_neox", *ROTARY_DECODERS, "gemma", "gemma2", "gemma3_text", "gemma3")
FAMILIES = (*DECODERS, *ENCODERS, *ENCODER_DECODERS)

Config = dict[str, Any]
# Edits of a stored table: "equal" and "unequal" add a copy, "moved" renames it.
Edits = dict[str, str]

_SMALL: Config = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_GEMMA = _GROUPED | {"head_dim": 16, "sliding_window": 7}
_OPT = {key: value for key, value in _SMALL.items() if key != "intermediate_size"} | {"ffn_dim": 48}
_T5: Config = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
BASE: dict[str, Config] = {
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "opt": _OPT,
    "gpt_neox": _SMALL,
    **dict.fromkeys(ROTARY_DECODERS, _GROUPED),
    "qwen3": _GROUPED | {"head_dim": 8},
    "gemma": {key: value for key, value in _GEMMA.items() if key != "sliding_window"},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3": {
        "text_config": _GEMMA | {"model_type": "gemma3_text"},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 95,
    },
    **dict.fromkeys(ENCODERS, _SMALL),
    "distilbert": {
        "vocab_size": 96,
        "dim": 48,
        "n_heads": 4,
        "n_layers": 2,
        "hidden_dim": 40,
        "max_position_embeddings": 64,
    },
    **dict.fromkeys(ENCODER_DECODERS, _T5),
    "bart": {
        "vocab_size": 96,
        "d_model": 32,
        "max_position_embeddings": 64,
        **{
            f"{stack}_{key}": value
            for stack in ("encoder", "decoder")
            for key, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 40}.items()
        },
    },
}
# The table that others are tied to, and the tied ones in the order in which they are edited.
_LLAMA_TABLES = ("model.embed_tokens.weight", ("lm_head.weight",))
_STACKS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys((*ROTARY_DECODERS, "gemma", "gemma2", "gemma3_text"), _LLAMA_TABLES),
    "gpt2": ("transformer.wte.weight", ("lm_head.weight",)),
    "opt": ("model.decoder.embed_tokens.weight", ("lm_head.weight",)),
    "gpt_neox": ("gpt_neox.embed_in.weight", ("embed_out.weight",)),
    "gemma3": (
        "language_model.model.embed_tokens.weight",
        ("language_model.lm_head.weight",),
    ),
    **dict.fromkeys(("t5", "mt5"), ("shared.weight", (*_STACKS, "lm_head.weight"))),
    "bart": (
        "model.shared.weight",
        (*(f"model.{name}" for name in _STACKS), "lm_head.weight"),
    ),
}


def _auto(family: str) -> Any:
    if family in ENCODERS:
        return transformers.AutoModel
    if family in ENCODER_DECODERS:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def _write(directory: Path, config: Config, edits: Edits, seed: int) -> None:
    """Saves a random model and edits its stored tables."""
    family = config["model_type"]
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    read = transformers.AutoConfig.from_pretrained(directory)
    model = _auto(family).from_config(read, attn_implementation="eager").float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.2)
            if "norm" in name.lower() or "ln_" in name:
                weight.add_(0.0 if name.endswith("bias") else 1.0)
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").unlink(missing_ok=True)
    file = directory / "model.safetensors"
    tensors = safetensors_torch.load_file(file)
    source = TABLES[family][0] if edits else ""
    generator = torch.Generator().manual_seed(seed)
    for name, edit in edits.items():
        if edit == "moved" and source in tensors:
            tensors[name] = tensors.pop(source)
        elif edit == "equal" and source in tensors:
            tensors[name] = tensors[source].clone()
        elif edit == "unequal" and source in tensors:
            tensors[name] = 0.2 * torch.randn(tensors[source].shape, generator=generator)
    safetensors_torch.save_file(tensors, file, metadata={"format": "pt"})


def _theirs(directory: Path, family: str, ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Logits or hidden states.

    Raises:
        ValueError: the checkpoint lacks weights, which would be random.
    """
    model, report = _auto(family).from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    unused = ("pooler", "final_logits_bias")
    if missing := [key for key in report["missing_keys"] if not any(u in key for u in unused)]:
        raise ValueError(f"missing: {missing}")
    given = {"input_ids": torch.from_numpy(ids)}
    if family in ENCODER_DECODERS:
        given["decoder_input_ids"] = torch.from_numpy(targets)
    with torch.no_grad():
        output = model.eval()(**given)
    states: np.ndarray = (output.last_hidden_state if family in ENCODERS else output.logits).numpy()
    return states


def _ours(directory: Path, family: str, ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    model = load(directory, dtype="float32")
    backbone, params, encoded = model.backbone, model.params, None

    def tokens(ids: np.ndarray) -> TokenLayout:
        return TokenLayout.plain(jnp.ones(ids.shape, bool))

    if family in ENCODER_DECODERS:
        encoded = backbone.encode(params, jnp.asarray(ids), tokens(ids))
        ids = targets
    h_BTD, _ = backbone.hidden(params, jnp.asarray(ids), tokens(ids), encoded=encoded)
    return np.asarray(h_BTD if family in ENCODERS else backbone.unembed(params, h_BTD))


def _inputs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids for the input and, with an encoder, for the decoder."""
    rng = np.random.default_rng(seed)
    return rng.integers(4, 90, (2, 21)), rng.integers(4, 90, (2, 19))


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _model(family: str, **config: Any) -> Config:
    return {"model_type": family} | BASE[family] | config


def _gemma3(above: Config | None = None, **text: Any) -> Config:
    whole = _model("gemma3", **(above or {}))
    return whole | {"text_config": whole["text_config"] | text}


_YARN = {"rope_type": "yarn", "factor": 4.0}
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_TOP_LEVEL = {"original_max_position_embeddings": 16}
_LINEAR = {"rope_type": "linear", "factor": 4.0}
VARIANTS: dict[str, tuple[Config, Edits]] = {
    **{
        f"{family} tied, {edit} head": (
            _model(family, tie_word_embeddings=True),
            {TABLES[family][1][-1]: edit},
        )
        for family in DECODERS + ENCODER_DECODERS
        for edit in ("unequal", "moved")
    },
    **{
        f"{family}, tables of the stacks ({'tied' if tied else 'untied'})": (
            _model(family, tie_word_embeddings=tied),
            dict.fromkeys(TABLES[family][1][:2], "unequal"),
        )
        for family in ENCODER_DECODERS
        for tied in (True, False)
    },
    "bart, a table of the decoder": (_model("bart"), {TABLES["bart"][1][1]: "unequal"}),
    "gemma3 untied above": (_gemma3({"tie_word_embeddings": False}), {}),
    "gemma3 untied below": (_gemma3(tie_word_embeddings=False), {}),
    "gemma3 capped": (_gemma3(final_logit_softcapping=2.0), {}),
    "gemma2 with a period": (_model("gemma2", sliding_window_pattern=3), {}),
    "gemma with later keys": (
        _model("gemma", query_pre_attn_scalar=7, final_logit_softcapping=2.0),
        {},
    ),
    "yarn, top-level length": (_model("llama", rope_scaling=_YARN, **_TOP_LEVEL), {}),
    "llama3, top-level length": (_model("llama", rope_scaling=_LLAMA3, **_TOP_LEVEL), {}),
    "rope_scaling replaces": (
        _model("llama", rope_parameters={"rope_theta": 100.0}, rope_scaling=_LINEAR),
        {},
    ),
    "partial, ignored": (
        _model("llama", rope_parameters={"rope_theta": 100.0, "partial_rotary_factor": 0.5}),
        {},
    ),
    "yarn, very short": (
        _model("llama", rope_scaling=_YARN | {"original_max_position_embeddings": 4}),
        {},
    ),
    "neox, theta of others": (_model("gpt_neox", rope_theta=100.0), {}),
    "mistral by layer": (
        _model(
            "mistral",
            head_dim=8,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        {},
    ),
    "distilbert with an epsilon": (_model("distilbert", layer_norm_eps=0.1), {}),
    "electra without heads": (
        {k: v for k, v in _model("electra").items() if k != "num_attention_heads"},
        {},
    ),
    "gpt2, other spellings": (_model("gpt2", num_hidden_layers=3, num_attention_heads=2), {}),
    "t5, written activation": (_model("t5", dense_act_fn="silu", is_gated_act=True), {}),
    **{
        f"activation {name}": (_model("gpt2", activation_function=name), {})
        for name in _ACTIVATIONS
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_equals_transformers(name: str, tmp_path: Path, difference: Any) -> None:
    config, edits = VARIANTS[name]
    _write(tmp_path, config, edits, seed=7)
    inputs = _inputs(7)
    theirs = _theirs(tmp_path, config["model_type"], *inputs)
    ours = _ours(tmp_path, config["model_type"], *inputs)
    difference("configs, relative", _relative(ours, theirs), LIMIT, model=name)


class _Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def some(self, share: float, choices: Mapping[str, list[Any]]) -> Config:
        """Each key with this probability, with one of its values."""
        return {
            key: self.random.choice(values)
            for key, values in choices.items()
            if self.random.random() < share
        }

    def rope(self) -> Config:
        """One set of rotary parameters."""
        kind = self.random.choice([None, "default", "linear", "llama3", "yarn"])
        rope: Config = {} if kind is None else {self.random.choice(["rope_type", "type"]): kind}
        rope |= self.some(0.4, {"rope_theta": [100.0, 500.0]})
        if kind in ("linear", "llama3", "yarn"):
            rope["factor"] = self.random.choice([2.0, 8.0])
        if kind == "llama3":
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        if kind in ("llama3", "yarn"):
            rope |= self.some(0.5, {"original_max_position_embeddings": [4, 16, 32]})
        if kind == "yarn":
            yarn = {"beta_fast": [8], "beta_slow": [2], "mscale": [0.7], "mscale_all_dim": [0.5]}
            rope |= self.some(0.25, yarn | {"attention_factor": [1.1], "truncate": [False]})
        return rope | self.some(0.15, {"partial_rotary_factor": [0.5, 1.0]})

    def rotary(self) -> Config:
        """Rotary parameters at both levels."""
        config = self.some(0.5, {"rope_parameters": [self.rope()]})
        config |= self.some(0.4, {"rope_scaling": [self.rope(), self.rope(), {}, None]})
        config |= self.some(0.4, {"rope_theta": [100.0, 1000.0], "rotary_emb_base": [200.0]})
        config |= self.some(0.2, {"original_max_position_embeddings": [8, 32]})
        return config | self.some(0.1, {"partial_rotary_factor": [0.25, 1.0]})

    def kinds(self) -> list[str]:
        return self.random.choices(["full_attention", "sliding_attention"], k=3)

    def config(self, family: str) -> Config:
        activations = list(_ACTIVATIONS)
        config = _model(family)
        inner = config["text_config"] if family == "gemma3" else config
        choices: dict[str, list[Any]] = {
            **dict.fromkeys(
                ("hidden_act", "hidden_activation", "activation_function", "activation"),
                activations,
            ),
            "rms_norm_eps": [1e-3],
            "layer_norm_eps": [1e-3],
            "layer_norm_epsilon": [1e-3],
            "attention_bias": [True, False],
            "mlp_bias": [True],
            "layer_types": [self.kinds()],
            "sliding_window": [5, 9],
            "sliding_window_pattern": [2, 3],
            "use_sliding_window": [True],
            "max_window_layers": [1],
            "query_pre_attn_scalar": [7],
            "final_logit_softcapping": [2.0, None],
            "rope_local_base_freq": [50.0],
            "rotary_pct": [0.5, 1.0],
            "use_parallel_residual": [False],
            "type_vocab_size": [1, 3],
            "enable_bias": [False],
            "scale_embedding": [True],
            "feed_forward_proj": ["relu", "gated-gelu", "gated-silu", "gelu"],
            "num_decoder_layers": [1, None],
            "relative_attention_num_buckets": [8, 32],
            "relative_attention_max_distance": [9, 17, 40],
            "scale_decoder_outputs": [True, False],
        }
        if family != "gemma3_text" and family != "gemma3":
            choices["attn_logit_softcapping"] = [2.0, None]
        inner |= self.some(0.25, choices)
        inner |= self.some(0.6, {"tie_word_embeddings": [True, False]})
        if family not in ("gemma3_text", "gemma3"):
            inner |= self.rotary()
        elif self.random.random() < 0.5:
            inner |= self.some(0.5, {"rope_scaling": [self.rope()]})
            by_kind = {"full_attention": [self.rope()], "sliding_attention": [self.rope()]}
            inner |= self.some(0.5, {"rope_parameters": [self.some(0.8, by_kind)]})
        if family == "gemma3":
            config |= self.some(0.6, {"tie_word_embeddings": [True, False]})
        return config

    def edits(self, family: str) -> Edits:
        if family not in TABLES:
            return {}
        edits = ["equal", "unequal", "unequal", "moved"]
        return self.some(0.4, dict.fromkeys(TABLES[family][1], edits))


# Outcomes of the random configurations: those that we computed, and those that we rejected.
_computed: list[int] = []
_rejected: list[int] = []
# About 10 % are rejected, because we do not support their combination of features.
_MAX_REJECTED = 0.25


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + DRAWS))
def test_random_configuration_equals_transformers_or_is_rejected(
    seed: int, tmp_path: Path, difference: Any
) -> None:
    draw = _Draw(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    config, edits, inputs = draw.config(family), draw.edits(family), _inputs(seed)
    theirs: np.ndarray | None = None
    try:
        _write(tmp_path, config, edits, seed)
        theirs = _theirs(tmp_path, family, *inputs)
    except Exception as error:
        # Configurations that transformers cannot build, load or compute.
        failure = repr(error)
    if not (tmp_path / "model.safetensors").exists():
        pytest.skip(f"transformers does not build it: {failure}")
    try:
        ours = _ours(tmp_path, family, *inputs)
    except BackboneError as error:
        _rejected.append(seed)
        pytest.skip(f"rejected: {error}")
    finally:
        jax.clear_caches()
    _computed.append(seed)
    if theirs is None:
        pytest.skip(f"transformers fails: {failure}")
    if not np.isfinite(theirs).all():
        pytest.skip("transformers computes numbers that are not finite")
    difference("random configs, relative", _relative(ours, theirs), LIMIT, model=family)


def test_most_random_configurations_are_computed() -> None:
    count = len(_computed) + len(_rejected)
    if not count:
        pytest.skip("needs the random configurations of this module")
    assert len(_rejected) <= max(_MAX_REJECTED * count, 2), f"rejected seeds: {_rejected}"
