"""A small random model and its byte-level tokenizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefix_jax.backbones.architecture import Architecture
from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.stacking import Params
from prefix_jax.decode import Generator
from prefix_jax.nn.rotary import Rotary
from prefix_jax.prefix import KVPrefix, Prefix, Site

P = 3


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; token 256 is the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return Backbone(
        Architecture(
            model_type="llama",
            layers=2,
            d_model=32,
            heads=4,
            kv_heads=2,
            head_dim=8,
            d_ff=48,
            vocab=257,
            max_positions=256,
            norm="rms",
            epsilon=1e-5,
            activation="silu",
            gated=True,
            rotary=Rotary(100.0),
        )
    )


@pytest.fixture(scope="session")
def params(backbone: Backbone) -> Params:
    """Stacked weights, large enough that no two tokens are almost equally likely."""
    params = backbone.init(jax.random.key(1))
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 2 else leaf, params) | {
        "embed": {"tokens_VD": params["embed"]["tokens_VD"] * 25}
    }


@pytest.fixture(scope="session")
def prefix(backbone: Backbone) -> Prefix:
    a = backbone.arch
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, a.layers, P, a.kv_heads, a.head_dim)).astype(np.float32)
    return Prefix(Site(KVPrefix(jnp.asarray(k), jnp.asarray(v))), text_position=P)


@pytest.fixture(scope="session")
def generator(
    backbone: Backbone, params: Params, tokenizer: PreTrainedTokenizerFast, prefix: Prefix
) -> Generator:
    copy = jax.tree.map(jnp.copy, params)
    return Generator(backbone, backbone.unstacked(copy), tokenizer, prefix)
