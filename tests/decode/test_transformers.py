"""Tests that greedy decoding and beam search return the same tokens as transformers.

The expected results, with and without a prefix, come from `tests/fixtures/make_decode.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.config import DecodeConfig
from prefix_jax.decode import Generator
from prefix_jax.prefix import KVPrefix, Prefix, Site, SiteName

FIXTURES = Path(__file__).parents[1] / "fixtures"
RUNS = json.loads((FIXTURES / "decode.json").read_text(encoding="utf-8"))
P, SLOTS = 5, 3


def letter(token: int) -> str:
    """Returns the text of a token: one letter, or a space."""
    return " " if token == 5 else chr(0x400 + token)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with 96 letters, so that banned words correspond to their tokens."""
    tokenizer = Tokenizer(models.WordLevel({letter(t): t for t in range(96)}, unk_token=letter(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@functools.cache
def model(name: str) -> Pretrained:
    folders = (FIXTURES / "backbones" / name, FIXTURES / "encoder_decoders" / name)
    return load(next(folder for folder in folders if folder.exists()), dtype="float32")


def peft_prefix(backbone: Backbone, seed: int) -> Prefix:
    """The prefix of `make_decode.random_prefix`."""
    a = backbone.arch
    shape = (P, a.layers, 2, a.kv_heads, a.head_dim)
    flat = np.random.default_rng(seed).normal(size=(P, int(np.prod(shape[1:]))))
    k_LPKH, v_LPKH = flat.astype(np.float32).reshape(shape).transpose(2, 1, 0, 3, 4)
    return Prefix(Site(KVPrefix(jnp.asarray(k_LPKH), jnp.asarray(v_LPKH))), text_position=P)


def sites_prefix(backbone: Backbone, seed: int) -> Prefix:
    """The prefix of `make_encoder_decoders.random_sites`."""
    rng = np.random.default_rng(seed)
    sites: dict[SiteName, Site] = {}
    for name in ("encoder", "decoder", "cross"):
        shape = backbone.geometry.sites[name]
        size = (2, shape.layers, SLOTS, shape.kv_heads, shape.head_dim)
        sites[name] = Site(KVPrefix(*jnp.asarray(rng.normal(size=size), jnp.float32)))
    return Prefix.of(sites, text_position=SLOTS)


def check(run: dict[str, Any], pretrained: Pretrained) -> float:
    """Compares a ragged batch of all prompts with transformers, which ran each prompt separately.

    Tokens must be equal; returns the largest score difference relative to 1 + |score|.
    """
    options = dict(run["options"])
    banned = options.pop("banned_words", [])
    backbone, make_prefix = pretrained.backbone, peft_prefix
    if backbone.arch.encoder is not None:
        forced = {"first_id": options.pop("first", None), "last_id": options.pop("last", None)}
        backbone = Backbone(dataclasses.replace(backbone.arch, **forced))
        make_prefix = sites_prefix
    config = DecodeConfig(
        **options, banned_words=tuple("".join(map(letter, word)) for word in banned)
    )
    seed = run["prefix_seed"]
    generator = Generator(
        backbone,
        pretrained.params,
        tokenizer(),
        None if seed is None else make_prefix(backbone, seed),
        eos=tuple(run["eos"]),
    )
    generations = generator.generate(run["prompts"], config)
    differences = [0.0]
    for generation, ids, scores in zip(generations, run["ids"], run["scores"], strict=True):
        assert [list(sample.ids) for sample in generation.samples] == ids
        ours = [sample.score for sample in generation.samples]
        np.testing.assert_allclose(ours, scores, rtol=1e-5, atol=1e-5)
        differences.append(np.max(np.abs(np.subtract(ours, scores)) / (1 + np.abs(scores))))
    return max(differences)


@pytest.mark.parametrize("behind", [False, True], ids=["bare", "prefix"])
@pytest.mark.parametrize("name", ["gpt2", "mistral_window"])
def test_decoding_matches_transformers(name: str, behind: bool) -> None:
    runs = [r for r in RUNS if r["model"] == name and (r["prefix_seed"] is not None) == behind]
    assert len(runs) >= 6
    for run in runs:
        check(run, model(name))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_match_transformers(name: str) -> None:
    """T5 bare and with a prefix at every attention; BART with tokens forced at both ends."""
    runs = [r for r in RUNS if r["model"] == name]
    assert len(runs) >= 3
    for run in runs:
        check(run, model(name))
