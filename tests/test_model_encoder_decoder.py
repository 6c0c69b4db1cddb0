"""Losses and packing of an encoder-decoder with a method."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decoders import decoder, present, weights

from prefix_jax.backbones.backbone import Backbone
from prefix_jax.backbones.families import t5
from prefix_jax.data.batch import Example
from prefix_jax.data.pack import Packing, arrange, collate, measure
from prefix_jax.errors import ContextError, PrefixError
from prefix_jax.mesh import make_mesh
from prefix_jax.methods.hidden import HiddenPrefixTuning
from prefix_jax.methods.prefix import PrefixTuning
from prefix_jax.methods.prompt import PromptTuning
from prefix_jax.model import PrefixModel

P = 4
BACKBONE = Backbone(t5.architecture(tiny.T5_CONFIG))
METHODS = {
    "prefix": PrefixTuning(P),
    "cross": PrefixTuning(P, sites=("cross",), layers=(1,)),
    "prompt": PromptTuning(P),
}


def examples() -> list[Example]:
    """Five targets of 2 to 6 tokens for three sources."""
    rng = np.random.default_rng(0)
    sources = [rng.integers(0, 256, size).astype(np.int32) for size in (3, 7, 5)]
    pairs = []
    for number, size in enumerate((2, 6, 4, 3, 5)):
        ids = np.array([257, *rng.integers(0, 256, size)], np.int32)
        learnt = np.arange(len(ids)) > 0
        pairs.append(Example.of_text(ids, learnt, "x", source_ids_S=sources[number % 3]))
    return pairs


@pytest.fixture(scope="module")
def weights_() -> Any:
    return weights(BACKBONE)


@pytest.mark.parametrize("name", METHODS)
def test_loss_is_the_sum_of_single_losses(name: str, weights_: Any) -> None:
    model = PrefixModel(BACKBONE, METHODS[name])
    prefix = METHODS[name].init(jax.random.key(1), BACKBONE.geometry, None)
    params = {"backbone": weights_, "prefix": prefix}
    lifted = jax.jit(model.prefix)(params)
    pairs = examples()
    batch = collate(arrange(measure(pairs), Packing(pack=model.packs)), pairs)
    assert (len(batch.ids_BT) < 3) if model.packs else (len(batch.ids_BT) == len(pairs))

    @jax.jit
    def logprobs(source: Any, source_tokens: Any, ids: Any, tokens: Any) -> jax.Array:
        encoded = BACKBONE.encode(weights_, source, source_tokens, lifted)
        h_BTD, _ = BACKBONE.hidden(weights_, ids, tokens, lifted, encoded=encoded)
        return jax.nn.log_softmax(BACKBONE.unembed(weights_, h_BTD))[0]

    total = 0.0
    for pair in pairs:
        sides = []
        for ids in (pair.source_ids_S, pair.ids_T):
            here = jnp.arange(8)[None] < len(ids)
            row = jnp.zeros((1, 8), jnp.int32).at[0, : len(ids)].set(ids)
            sides += [row, dataclasses.replace(present(1, 8), segment_BT=here.astype(jnp.int32))]
        logprobs_TV = logprobs(*sides)
        total -= sum(float(logprobs_TV[t, pair.ids_T[t + 1]]) for t in range(len(pair.ids_T) - 1))
    np.testing.assert_allclose(jax.jit(model.loss)(params, batch), total, rtol=1e-4)
    scores_B = jax.jit(model.score)(weights_, lifted, batch)
    np.testing.assert_allclose(scores_B.sum(), total, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_sharded_columns_give_equal_losses_and_gradients(name: str, weights_: Any) -> None:
    model = PrefixModel(BACKBONE, METHODS[name])
    prefix = METHODS[name].init(jax.random.key(1), BACKBONE.geometry, None)
    pairs = examples()
    batch = collate(arrange(measure(pairs), Packing(pack=model.packs)), pairs)

    def loss(prefix: Any) -> jax.Array:
        return model.loss({"backbone": weights_, "prefix": prefix}, batch)

    alone = jax.jit(jax.value_and_grad(loss))(prefix)
    with jax.set_mesh(make_mesh(2, sequence=4)):
        # A new function, so that the first program is not reused.
        shared = jax.jit(jax.value_and_grad(lambda prefix: loss(prefix)))(prefix)
    np.testing.assert_allclose(shared[0], alone[0], rtol=1e-5)
    for ours, theirs in zip(*(jax.tree.leaves(grads) for _, grads in (shared, alone)), strict=True):
        # T5's logits are not scaled: the last bit of a prompt changes gradients by 5e-5 of the
        # largest.
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * float(abs(theirs).max()))


def test_examples_pack_unless_the_encoder_has_soft_tokens() -> None:
    packs = [PrefixModel(BACKBONE, method).packs for method in METHODS.values()]
    assert packs == [True, True, False]
    assert PrefixModel(decoder("llama"), PromptTuning(P)).packs


def test_each_stack_has_room_after_its_prefix() -> None:
    encoder = dataclasses.replace(BACKBONE.arch.encoder, max_positions=30)
    backbone = Backbone(dataclasses.replace(BACKBONE.arch, max_positions=20, encoder=encoder))

    def room(method: Any) -> tuple[int, int]:
        model = PrefixModel(backbone, method)
        return model.room, model.encoder_decoder.max_target

    assert room(None) == (30, 20)
    assert room(PrefixTuning(P)) == (30 - P, 20 - P)
    assert room(PrefixTuning(P, sites=("cross",))) == (30, 20)
    assert room(PrefixTuning(P, sites=("decoder",))) == (30, 20 - P)
    assert room(PromptTuning(P)) == (30 - P, 20)
    with pytest.raises(ContextError, match="no room"):
        PrefixModel(backbone, PrefixTuning(19)).check_context(None)
    with pytest.raises(ContextError, match=r"data\.max_length 27 .* 30 positions; at most 26"):
        PrefixModel(backbone, PromptTuning(P)).check_context(27)


def test_rejects_hidden_states_with_advice() -> None:
    with pytest.raises(PrefixError, match=r"method\.name: prefix"):
        PrefixModel(BACKBONE, HiddenPrefixTuning(P)).check_context(None)
