"""Small engines with prefixes of every kind, and the same rows decoded separately."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import decoders
import encoder_decoders
import jax
import jax.numpy as jnp
import numpy as np
from decoders import V, decoder
from encoder_decoders import encoder_decoder
from tokenizers import Tokenizer
from tokenizers import decoders as text
from tokenizers import models as bpe
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from prefix_jax import artifact
from prefix_jax.artifact import BackboneCard, Card
from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.config import DecodeConfig
from prefix_jax.decode import Generation, Generator
from prefix_jax.engine import EngineCore, Event, Handle
from prefix_jax.mesh import make_mesh
from prefix_jax.prefix import (
    SITES,
    Adapter,
    Embeds,
    Geometry,
    Hidden,
    KVPrefix,
    Memory,
    Prefix,
    Produced,
    Site,
    SiteName,
)

Names = Sequence[str | None]
GREEDY = DecodeConfig(max_new_tokens=8)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character, without an end token."""
    vocab = {chr(33 + i): i for i in range(V)}
    tokenizer = Tokenizer(bpe.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre.Split("", "isolated")
    tokenizer.decoder = text.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def backbone_of(name: str) -> Backbone:
    """A small decoder or encoder-decoder."""
    return encoder_decoder(name) if name in encoder_decoders.NAMES else decoder(name)


@functools.cache
def model(name: str) -> Pretrained:
    """A random model of `decoders` or `encoder_decoders` on one device."""
    backbone, mesh = backbone_of(name), make_mesh(1, devices=jax.devices()[:1])
    family = encoder_decoders if name in encoder_decoders.NAMES else decoders
    params = backbone.unstacked(family.weights(backbone))
    model = Pretrained(backbone, params, mesh, name, Path(name), name)
    model.__dict__["tokenizer"] = tokenizer()
    return model


def card(model: Pretrained, produced: Produced, **fields: Any) -> Card:
    """The card of a prefix for a model."""
    backbone = BackboneCard(
        source=model.source,
        model_type=model.backbone.arch.model_type,
        fingerprint=model.fingerprint,
        dtype="float32",
    )
    return artifact.make_card(produced, model.backbone.geometry, backbone, **fields)


@functools.cache
def prefixes(name: str) -> dict[str, Produced]:
    """A prefix of every kind for a model."""
    geometry, rng = backbone_of(name).geometry, np.random.default_rng(0)
    if geometry.encoder is not None:
        return _encoder_decoder_prefixes(geometry)
    shape, D = geometry.sites["decoder"], geometry.input_dim
    L, N, K, H = shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim

    def normal(*size: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=size), jnp.float32)

    def slots(layers: int, P: int, bias: bool = False) -> KVPrefix:
        k, v = normal(layers, P, K, H), normal(layers, P, K, H)
        return KVPrefix(2 * k, 2 * v, 2 * normal(layers, P, N) if bias else None)

    bias = slots(L, 5, bias=True)
    assert bias.bias_LPN is not None
    bias = dataclasses.replace(bias, bias_LPN=bias.bias_LPN.at[1, 2].set(-jnp.inf))
    return {
        "kv": Prefix(Site(slots(L, 5)), text_position=5),
        "long": Prefix(Site(slots(L, 11)), text_position=11),
        "pinned": Prefix(Site(slots(L, 5)), text_position=5, pinned=True),
        "bias": Prefix(Site(bias), text_position=5),
        "layers": Prefix(Site(slots(2, 5), layers=(0, 2)), text_position=5),
        "position": Prefix(Site(slots(L, 5)), text_position=2),
        "embeds": Embeds(normal(5, D)),
        "hidden": Hidden(3 * normal(L, 5, D)),
        "adapter": Adapter(3 * normal(2, 3, D), 1 + normal(2, 1), layers=(0, 2)),
        "plus": Prefix(Site(outside=Memory(normal(L, N, H, H)))),
    }


def _encoder_decoder_prefixes(geometry: Geometry) -> dict[str, Produced]:
    """Prefixes at all attentions of an encoder-decoder."""
    rng = np.random.default_rng(0)

    def normal(*size: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=size), jnp.float32)

    def slots(P: int, names: Sequence[SiteName] = SITES, **options: Any) -> Prefix:
        layers, bias = options.pop("layers", None), options.pop("bias", False)
        sites: dict[SiteName, Site] = {}
        for name in names:
            shape = geometry.sites[name]
            size = (len(layers or range(shape.layers)), P)
            k, v = (2 * normal(*size, shape.kv_heads, shape.head_dim) for _ in range(2))
            bias_LPN = 2 * normal(*size, shape.query_heads) if bias else None
            sites[name] = Site(KVPrefix(k, v, bias_LPN), layers=layers)
        return Prefix.of(sites, **{"text_position": P, **options})

    memories: dict[SiteName, Site] = {
        name: Site(outside=Memory(normal(x.layers, x.query_heads, x.head_dim, x.head_dim)))
        for name, x in geometry.sites.items()
    }
    return {
        "kv": slots(5),
        "bias": slots(3, bias=True),
        "layers": slots(5, layers=(0, 1)),
        "encoder": slots(5, ("encoder",), text_position=2),
        "cross": slots(5, ("cross",)),
        "embeds": Embeds(normal(3, geometry.input_dim)),
        "adapter": Adapter(3 * normal(2, 3, geometry.d_model), 1 + normal(2, 1), layers=(0, 1)),
        "plus": Prefix.of(memories),
    }


def core(name: str, kinds: Sequence[str] | None = None, **options: Any) -> EngineCore:
    """An engine with some or all prefixes of a model."""
    pretrained = model(name)
    # Without drafts, programs compile twice as fast.
    defaults = {"rows": 4, "decode_steps": 4, "chunk": 32, "num_speculative_tokens": 0}
    core = EngineCore(pretrained, **{**defaults, **options})
    for kind, produced in prefixes(name).items():
        if kinds is None or kind in kinds:
            core.bank.add(kind, produced, card(pretrained, produced), (), None)
    return core


@functools.cache
def _generator(name: str, kind: str | None) -> Generator:
    pretrained = model(name)
    produced = None if kind is None else prefixes(name)[kind]
    prefix = decoders.lift(pretrained.backbone, pretrained.params, produced)
    return Generator(pretrained.backbone, pretrained.params, tokenizer(), prefix, eos=())


def alone(
    name: str, kind: str | None, prompts: Sequence[Sequence[int]], config: DecodeConfig
) -> list[Generation]:
    """Results of `Generator` with one prefix."""
    return _generator(name, kind).generate(prompts, config)


def prompts(count: int, longest: int = 20, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def finish(core: EngineCore, *handles: Handle) -> list[Event]:
    events = []
    while not all(handle.done for handle in handles):
        events += core.step()
    return events


def assert_equal(generation: Generation | None, expected: Generation) -> None:
    assert generation is not None
    for sample, same in zip(generation.samples, expected.samples, strict=True):
        assert sample.ids == same.ids
        assert (sample.text, sample.finish) == (same.text, same.finish)
        np.testing.assert_allclose(sample.logprobs, same.logprobs, atol=1e-4)
