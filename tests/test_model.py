"""Losses, scores and starts of a backbone with a method."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import batch_of, decoder, examples, hidden, lift, present, read, token_ids, weights

from prefix_jax.errors import ContextError
from prefix_jax.methods.adapter import LlamaAdapter
from prefix_jax.methods.base import normal_like
from prefix_jax.methods.cartridge import Cartridge
from prefix_jax.methods.hidden import HiddenPrefixTuning
from prefix_jax.methods.multitask import MultitaskPromptTuning
from prefix_jax.methods.plus import PrefixTuningPlus
from prefix_jax.methods.prefix import PrefixTuning
from prefix_jax.methods.prompt import PromptTuning
from prefix_jax.methods.ptuning import PTuning
from prefix_jax.model import PrefixModel, start_from_ids
from prefix_jax.prefix import Adapter, Embeds, Hidden, Prefix

P = 4
BACKBONE = decoder("llama")
METHODS = {
    "prefix": PrefixTuning(P),
    "mlp": PrefixTuning(P, mid_dim=8),
    "hidden": HiddenPrefixTuning(P),
    "prompt": PromptTuning(P),
    "lstm": PTuning(P, encoder="lstm", hidden=8),
    "multitask": MultitaskPromptTuning(P),
    "cartridge": Cartridge(P),
}
# Terms outside the softmax, which do not precede the text.
BESIDE = {"adapter": LlamaAdapter(P, layers=2), "plus": PrefixTuningPlus(layers=(0, 2))}


@pytest.fixture(scope="module")
def weights_():
    return weights(BACKBONE)


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return np.asarray(token_ids(P, seed=1))


@pytest.fixture(scope="module")
def example_losses(weights_, text) -> np.ndarray:
    """The loss of each of 6 examples separately, with the prefix's actual text before it."""

    def alone(example) -> float:
        ids = jnp.asarray(np.concatenate([text, example.ids_T]))
        # Equal widths, so that one program is compiled.
        ids = jnp.pad(ids, (0, 16 - len(ids)))[None]
        h_BTD, _ = hidden(BACKBONE, weights_, ids, present(1, 16))
        logp_TV = jax.nn.log_softmax(BACKBONE.unembed(weights_, h_BTD)[0])
        targets = np.flatnonzero(example.target_T)
        return -sum(float(logp_TV[P + t - 1, example.ids_T[t]]) for t in targets)

    return np.array([alone(example) for example in examples(6)])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_packed_loss_is_the_sum_of_single_losses(method, weights_, text, example_losses):
    model = PrefixModel(BACKBONE, method)
    start = start_from_ids(BACKBONE, weights_, method.produces, text, P)
    prefix = method.init(jax.random.key(0), BACKBONE.geometry, start)
    batch = jax.tree.map(lambda leaf: leaf[0], batch_of(examples(6)))
    params = {"backbone": weights_, "prefix": prefix}
    np.testing.assert_allclose(jax.jit(model.loss)(params, batch), example_losses.sum(), rtol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "hidden", "lstm", "multitask", *BESIDE])
def test_baked_prefix_scores_like_its_method(name, weights_):
    method = (METHODS | BESIDE)[name]
    model = PrefixModel(BACKBONE, method)
    start = normal_like(method.blank(BACKBONE.geometry), jax.random.key(1), 0.5)
    if isinstance(start, Adapter):
        start = start.replace(gate_LN=jnp.full_like(start.gate_LN, 0.5))
    params = {
        "backbone": weights_,
        "prefix": method.init(jax.random.key(0), BACKBONE.geometry, start),
    }
    batch = jax.tree.map(lambda leaf: leaf[0], batch_of(examples(4)))
    baked = lift(BACKBONE, weights_, model.produced(params))
    scores = jax.jit(model.score)(weights_, baked, batch)
    bare = jax.jit(model.score)(weights_, None, batch)
    np.testing.assert_allclose(jax.jit(model.loss)(params, batch), scores.sum(), rtol=1e-5)
    assert abs(float(scores.sum() - bare.sum())) > 0.01


def test_scores_are_per_row(weights_, text, example_losses):
    model = PrefixModel(BACKBONE, METHODS["prefix"])
    prefix = start_from_ids(BACKBONE, weights_, Prefix, text, P)
    batch = jax.tree.map(lambda leaf: leaf[0], batch_of(examples(6), rows_multiple=3))
    score_B = jax.jit(model.score)(weights_, prefix, batch)
    assert score_B.shape == (len(batch.ids_BT),)
    np.testing.assert_allclose(score_B.sum(), example_losses.sum(), rtol=1e-4)


def test_bare_model_has_no_prefix(weights_):
    model = PrefixModel(BACKBONE, None)
    assert model.produced({"backbone": weights_}) is None
    assert model.prefix({"backbone": weights_}) is None


@pytest.mark.parametrize("size", [P - 1, P, P + 3])
def test_start_text_is_repeated_or_truncated_to_the_prefix_length(size, weights_):
    text = np.arange(size, dtype=np.int32)
    expected = np.array([(*range(size), 0)[:P]] if size < P else [range(P)])[0]
    start = start_from_ids(BACKBONE, weights_, Embeds, text, P)
    np.testing.assert_array_equal(start.x_PD, weights_["embed"]["tokens_VD"][expected])


@pytest.mark.parametrize(("index", "kind"), [(0, Embeds), (1, Hidden), (2, Prefix)])
def test_start_has_the_type_that_the_method_produces(index, kind, weights_, text):
    start = start_from_ids(BACKBONE, weights_, kind, text, P)
    assert isinstance(start, kind)
    expected = read(BACKBONE, weights_, jnp.asarray(text))[index]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), start, expected)


def test_room_depends_on_the_text_position():
    def room(method) -> int:
        return PrefixModel(BACKBONE, method).room

    assert room(None) == 64
    assert room(PrefixTuning(P)) == room(PromptTuning(P)) == 60
    assert (
        room(PrefixTuning(P, text_position=0))
        == room(BESIDE["adapter"])
        == room(BESIDE["plus"])
        == 64
    )
    assert room(PrefixTuning(P, text_position=30)) == 34


@pytest.mark.parametrize("method", [PromptTuning(2**20), HiddenPrefixTuning(2**20)])
def test_rejects_a_million_soft_tokens_before_tracing(method) -> None:
    message = "position 1048576, after the prefix, which leaves no room"
    with pytest.raises(ContextError, match=message):
        PrefixModel(BACKBONE, method).check_context(None)


def test_rejects_text_that_does_not_fit_after_the_prefix():
    model = PrefixModel(BACKBONE, PrefixTuning(P))
    model.check_context(60)
    model.check_context(None)
    with pytest.raises(ContextError, match=r"61 .*64 positions; at most 60 tokens fit"):
        model.check_context(61)
    with pytest.raises(ContextError, match="no room"):
        PrefixModel(BACKBONE, PrefixTuning(64)).check_context(None)
