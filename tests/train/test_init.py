"""Initial values of a prefix, for every value of `init.start`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import write_model
from tiny_runs import on_one_device

from prefix_jax import artifact
from prefix_jax.artifact import BackboneCard
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.config import InitConfig
from prefix_jax.data.batch import Example
from prefix_jax.errors import ConfigError, PrefixError
from prefix_jax.methods.adapter import LlamaAdapter
from prefix_jax.methods.base import Method
from prefix_jax.methods.cartridge import Cartridge
from prefix_jax.methods.hidden import HiddenPrefixTuning
from prefix_jax.methods.multitask import MultitaskPromptTuning
from prefix_jax.methods.plus import PrefixTuningPlus
from prefix_jax.methods.prefix import PrefixTuning
from prefix_jax.methods.prompt import PromptTuning
from prefix_jax.model import start_from_ids
from prefix_jax.prefix import Prefix, Produced, Site
from prefix_jax.train.init import init_prefix, make_start, start_of

P = 4
METHODS = [PrefixTuning(P), HiddenPrefixTuning(P), PromptTuning(P), Cartridge(P)]
each_method = pytest.mark.parametrize(
    "method", METHODS, ids=["prefix", "hidden", "prompt", "cartridge"]
)


@pytest.fixture(scope="module")
def pretrained(tiny_model_dir: Path) -> Pretrained:
    return on_one_device(tiny_model_dir)


EXAMPLES = [
    Example.of_text(np.array(ids, np.int32), np.arange(len(ids)) > 0, f"example {i}")
    for i, ids in enumerate([[10, 11], [12, 13, 14], [15, 16]])
]


def initial(method: Method, pretrained: Pretrained, seed: int = 0, **fields) -> Produced:
    """Returns what the method produces before the first step."""
    return method(init_prefix(method, InitConfig(**fields), pretrained, EXAMPLES, seed))


def after_reading(method: Method, pretrained: Pretrained, ids: list[int]) -> Produced:
    ids_P = np.array(ids, np.int32)
    return start_from_ids(pretrained.backbone, pretrained.params, method.produces, ids_P, P)


def assert_equal(a: Produced, b: Produced) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_differ(a: Produced, b: Produced) -> None:
    pairs = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    assert all((a != b).any() for a, b in pairs)


# Tokens.


@each_method
def test_default_text_is_the_beginning_of_the_training_examples(method, pretrained):
    assert_equal(initial(method, pretrained), after_reading(method, pretrained, [10, 11, 12, 13]))


@each_method
def test_repeats_or_cuts_a_given_text(method, pretrained):
    ids = pretrained.tokenizer("abc")["input_ids"]
    assert len(ids) == 3
    assert_equal(
        initial(method, pretrained, text="abc"),
        after_reading(method, pretrained, [*ids, ids[0]]),
    )
    assert_equal(
        initial(method, pretrained, text="abcabcabc"),
        after_reading(method, pretrained, [*ids, ids[0]]),
    )


def test_reads_a_text_from_a_file(pretrained, tmp_path):
    (tmp_path / "corpus.txt").write_text("abcabcabc", encoding="utf-8")
    ids = pretrained.tokenizer("abca")["input_ids"]
    expected = after_reading(METHODS[3], pretrained, ids)
    prefix = initial(METHODS[3], pretrained, text_file=str(tmp_path / "corpus.txt"))
    assert_equal(prefix, expected)
    with pytest.raises(ConfigError, match=r"init\.text_file nowhere\.txt: no such file"):
        initial(METHODS[3], pretrained, text_file="nowhere.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.txt '' has no tokens"):
        initial(METHODS[3], pretrained, text_file=str(tmp_path / "empty.txt"))


def test_refuses_a_text_without_tokens(pretrained, monkeypatch):
    monkeypatch.setitem(vars(pretrained), "tokenizer", lambda *_, **__: {"input_ids": [[]]})
    with pytest.raises(ConfigError, match=r"init\.text 'x' has no tokens"):
        initial(METHODS[0], pretrained, text="x")


def test_seed_determines_drawn_tokens(pretrained):
    method = METHODS[2]
    table = np.asarray(pretrained.params["embed"]["tokens_VD"])
    drawn = initial(method, pretrained, start="vocab").x_PD
    for row in np.asarray(drawn):
        assert (table == row).all(1).any()
    assert_equal(
        initial(method, pretrained, start="vocab"), initial(method, pretrained, start="vocab")
    )
    assert_differ(
        initial(method, pretrained, start="vocab"), initial(method, pretrained, 1, start="vocab")
    )


def test_draws_from_the_most_frequent_tokens(pretrained):
    method = PromptTuning(64)
    table = np.asarray(pretrained.params["embed"]["tokens_VD"])[:3]
    drawn = np.asarray(initial(method, pretrained, start="vocab", top=3).x_PD)
    drawn_ids = {int(i) for row in drawn for i in np.flatnonzero((table == row).all(1))}
    assert drawn_ids == {0, 1, 2}
    assert all((table == row).all(1).any() for row in drawn)
    whole = initial(method, pretrained, start="vocab")
    assert_equal(initial(method, pretrained, start="vocab", top=9999), whole)


def test_labels_fill_one_slot_each_and_the_rest_is_drawn(pretrained):
    table = np.asarray(pretrained.params["embed"]["tokens_VD"])
    (a,), (b, c) = (pretrained.tokenizer(label)["input_ids"] for label in ("a", "bc"))
    x_PD = np.asarray(
        initial(METHODS[2], pretrained, start="labels", labels=("a", "bc"), top=2).x_PD
    )
    np.testing.assert_array_equal(x_PD[0], table[a])
    np.testing.assert_allclose(x_PD[1], (table[b] + table[c]) / 2, rtol=1e-6)
    for row in x_PD[2:]:
        assert (table[:2] == row).all(1).any()
    same = {"start": "labels", "labels": ("a",), "top": 2}
    assert_equal(initial(METHODS[2], pretrained, **same), initial(METHODS[2], pretrained, **same))


def test_refuses_labels_that_do_not_fit(pretrained):
    with pytest.raises(ConfigError, match="labels requires soft tokens"):
        initial(METHODS[0], pretrained, start="labels", labels=("a",))
    with pytest.raises(ConfigError, match="has 5 classes, but the prefix has 4 slots"):
        initial(METHODS[2], pretrained, start="labels", labels=tuple("abcde"))
    with pytest.raises(ConfigError, match="a label without tokens"):
        initial(METHODS[2], pretrained, start="labels", labels=("a", ""))


# Defaults of methods.


@pytest.mark.parametrize("method", [LlamaAdapter(P), MultitaskPromptTuning(P), PrefixTuningPlus()])
def test_some_methods_default_to_the_start_of_their_paper(method, pretrained):
    assert_equal(initial(method, pretrained), initial(method, pretrained, start="random"))
    assert start_of(method, InitConfig()) == "random"
    assert start_of(method, InitConfig(text="abc")) == "text"
    assert start_of(METHODS[0], InitConfig()) == "text"


def test_adapter_starts_from_a_text_with_closed_gates(pretrained):
    adapter = initial(LlamaAdapter(P, layers=1), pretrained, text="abc")
    assert adapter.layers == (1,)
    assert adapter.h_LPD.any()
    assert not adapter.gate_LN.any()
    with pytest.raises(ConfigError, match="leave an adapter without gradients"):
        initial(LlamaAdapter(P), pretrained, start="zeros")


@pytest.mark.parametrize("start", ["text", "vocab"])
def test_methods_without_slots_cannot_start_from_tokens(start, pretrained):
    with pytest.raises(ConfigError, match=f"start: {start} fills slots, but this method has none"):
        initial(PrefixTuningPlus(), pretrained, start=start)


@pytest.mark.parametrize(
    "method",
    [LlamaAdapter(P, layers=1), PrefixTuningPlus(layers=(1,)), PrefixTuning(P, layers=(0,))],
    ids=["adapter", "plus", "prefix"],
)
def test_resumes_a_stored_prefix_of_some_layers(method, pretrained, store):
    produced = initial(method, pretrained, start="normal")
    path = store(produced)
    assert_equal(initial(method, pretrained, start="prefix", path=path), produced)
    other = dataclasses.replace(method, layers=None)
    with pytest.raises(PrefixError, match="layers"):
        initial(other, pretrained, start="prefix", path=path)


def test_refuses_gates_of_another_kind(pretrained, store):
    path = store(initial(LlamaAdapter(P), pretrained))
    with pytest.raises(PrefixError, match=r"other parts .* gates"):
        initial(LlamaAdapter(P, gate="plain"), pretrained, start="prefix", path=path)


# Numbers.


@each_method
def test_zeros_start(method, pretrained):
    produced = initial(method, pretrained, start="zeros")
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(produced))


@each_method
def test_normal_start_has_the_given_deviation(method, pretrained):
    produced = initial(method, pretrained, start="normal", std=0.3)
    for leaf in jax.tree.leaves(produced):
        assert float(leaf.std()) == pytest.approx(0.3, rel=0.25)
    assert_differ(produced, initial(method, pretrained, 1, start="normal", std=0.3))


@each_method
def test_random_start_is_left_to_the_method(method, pretrained):
    assert make_start(method, InitConfig("random"), pretrained, EXAMPLES, jax.random.key(0)) is None
    produced = initial(method, pretrained, start="random")
    assert_equal(produced, initial(method, pretrained, start="random"))
    assert_differ(produced, initial(method, pretrained, 1, start="random"))


@pytest.mark.parametrize("start", ["text", "vocab", "zeros", "normal", "random"])
def test_parameters_are_float32_for_any_start(start, pretrained):
    for method in [*METHODS, PrefixTuning(P, mid_dim=8)]:
        params = init_prefix(method, InitConfig(start), pretrained, EXAMPLES, 0)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


# Stored prefixes.


@pytest.fixture
def store(tmp_path: Path, pretrained: Pretrained) -> Callable[..., str]:
    """Saves a prefix for the tiny model and returns its path."""

    def save(produced: Produced, fingerprint: str | None = None) -> str:
        backbone = BackboneCard(
            source="tiny",
            model_type="llama",
            fingerprint=fingerprint or pretrained.fingerprint,
            dtype="float32",
        )
        card = artifact.make_card(produced, pretrained.backbone.geometry, backbone)
        artifact.save(tmp_path / "stored", produced, card, "safetensors")
        return str(tmp_path / "stored")

    return save


@each_method
def test_starts_from_a_stored_prefix(method, pretrained, store):
    produced = initial(method, pretrained, start="normal")
    assert_equal(initial(method, pretrained, start="prefix", path=store(produced)), produced)


def test_mlp_can_continue_stored_keys_and_values(pretrained, store):
    produced = initial(METHODS[0], pretrained, start="normal", std=1.0)
    again = initial(PrefixTuning(P, mid_dim=8), pretrained, start="prefix", path=store(produced))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), again, produced)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (PrefixTuning(P + 1), "text_position 4, sites decoder, but the method trains one of kind "
         "'kv', length 5, text_position 5"),
        (HiddenPrefixTuning(P), "text_position 4, sites decoder, but the method trains one of kind "
         "'hidden', length 4"),
        # The text would start at another position than in training.
        (PrefixTuning(P, text_position=0), "sites decoder, but the method .* 'kv', length 4, "
         "text_position 0"),
        (PrefixTuning(P, pinned=True), "the method .* text_position 4, sites decoder, pinned"),
    ],
)  # fmt: skip
def test_refuses_a_stored_prefix_that_the_method_does_not_train(method, message, pretrained, store):
    path = store(initial(METHODS[0], pretrained, start="normal"))
    with pytest.raises(PrefixError, match=message):
        initial(method, pretrained, start="prefix", path=path)


def test_never_drops_biases_of_a_stored_prefix_silently(pretrained, store):
    produced = initial(METHODS[0], pretrained, start="normal")
    inside = produced.decoder.inside.replace(bias_LPN=jnp.zeros((2, P, 4)))
    with pytest.raises(PrefixError, match="biases"):
        initial(
            METHODS[0],
            pretrained,
            start="prefix",
            path=store(Prefix(Site(inside), text_position=P)),
        )


def test_refuses_a_prefix_of_another_backbone(pretrained, store, tmp_path):
    produced = initial(METHODS[0], pretrained, start="normal")
    path = store(produced, fingerprint="something else")
    with pytest.raises(PrefixError, match="something else"):
        initial(METHODS[0], pretrained, start="prefix", path=path)
    deeper = on_one_device(write_model(tmp_path / "deeper", num_hidden_layers=3))
    with pytest.raises(PrefixError, match=r"layers: 2 in the prefix, 3 in the backbone"):
        initial(METHODS[0], deeper, start="prefix", path=store(produced))
