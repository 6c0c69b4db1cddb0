"""Outputs, initialisation and registry of all methods."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.errors import ConfigError
from prefix_jax.methods import METHODS, make_method, name_of, section_of
from prefix_jax.methods.adapter import LlamaAdapter
from prefix_jax.methods.base import normal, normal_like, zeros
from prefix_jax.methods.cartridge import Cartridge
from prefix_jax.methods.hidden import HiddenPrefixTuning
from prefix_jax.methods.multitask import MultitaskPromptTuning
from prefix_jax.methods.plus import PrefixTuningPlus
from prefix_jax.methods.prefix import PrefixTuning
from prefix_jax.methods.prompt import PromptTuning
from prefix_jax.methods.ptuning import PTuning
from prefix_jax.prefix import Embeds, Geometry, Hidden, KVPrefix, Prefix, Site, SiteShape

G = Geometry(d_model=32, vocab=50, decoder=SiteShape(3, 4, 2, 8))
P, KEY = 5, jax.random.key(0)

METHOD = {
    "prefix": PrefixTuning(P),
    "mlp": PrefixTuning(P, mid_dim=7),
    "hidden": HiddenPrefixTuning(P),
    "prompt": PromptTuning(P),
    "ptuning": PTuning(P, hidden=24),
    "lstm": PTuning(P, encoder="lstm", hidden=12),
    "multitask": MultitaskPromptTuning(P, ranks=2),
    "adapter": LlamaAdapter(P),
    "cartridge": Cartridge(P, frozen=0),
    "plus": PrefixTuningPlus(),
}
SHAPES = {
    "prefix": [(3, P, 2, 8), (3, P, 2, 8)],
    "mlp": [(3, P, 2, 8), (3, P, 2, 8)],
    "hidden": [(3, P, 32)],
    "prompt": [(P, 32)],
    "ptuning": [(P, 32)],
    "lstm": [(P, 32)],
    "multitask": [(P, 32)],
    "adapter": [(3, P, 32), (3, 4)],
    "cartridge": [(3, P, 2, 8), (3, P, 2, 8)],
    "plus": [(3, 4, 8, 8)],
}
each_method = pytest.mark.parametrize("name", METHOD)


def count(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@each_method
def test_output_fits_the_geometry(name):
    produced = METHOD[name](METHOD[name].init(KEY, G, None))
    assert isinstance(produced, METHOD[name].produces)
    assert [leaf.shape for leaf in jax.tree.leaves(produced)] == SHAPES[name]


@each_method
def test_trained_parameters_are_float32(name):
    leaves = jax.tree.leaves(METHOD[name].init(KEY, G, None))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_parameter_counts_match_the_papers():
    def size(name: str) -> int:
        return count(METHOD[name].init(KEY, G, None))

    assert size("prefix") == 2 * 3 * P * 2 * 8
    assert size("hidden") == 3 * P * 32
    assert size("prompt") == P * 32
    assert size("mlp") == P * 32 + (32 + 1) * 7 + (7 + 1) * 3 * 2 * 2 * 8
    assert size("ptuning") == P * 32 + (32 + 1) * 24 + (24 + 1) * 24 + (24 + 1) * 32
    lstm = 2 * 4 * 12 * (32 + 12 + 2) + 2 * 4 * 12 * (24 + 12 + 2)
    assert size("lstm") == P * 32 + lstm + (24 + 1) * 24 + (24 + 1) * 32
    assert size("multitask") == P * 32 + 2 * (P + 32)
    assert size("adapter") == 3 * (P * 32 + 4)
    assert size("cartridge") == size("prefix")
    assert size("plus") == 3 * 4 * 8 * 8


@each_method
def test_initial_output_equals_the_start(name):
    """Also with networks: their last layer matches P vectors exactly if P <= their width."""
    method = METHOD[name]
    start = normal_like(method.blank(G), jax.random.key(1), std=2.0)
    produced = method(method.init(KEY, G, start))
    exact = name not in ("mlp", "ptuning", "lstm")
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-4}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), produced, start)


def test_start_wider_than_the_mlp_is_fitted_by_least_squares():
    method = PrefixTuning(P, mid_dim=P - 2)
    start = normal(Prefix, G, P, jax.random.key(1), std=2.0)
    params = method.init(KEY, G, start)

    def error(params) -> float:
        difference = jax.tree.map(jnp.subtract, method(params), start)
        return sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(difference))

    least = error(params)
    assert 0 < least < error(method.init(KEY, G, None))
    for seed in range(3):
        mlp = params["decoder"]
        noise = 0.01 * jax.random.normal(jax.random.key(seed), mlp["out_XL2KH"].shape)
        assert error({"decoder": {**mlp, "out_XL2KH": mlp["out_XL2KH"] + noise}}) > least


def test_export_keeps_only_keys_and_values():
    produced = METHOD["mlp"](METHOD["mlp"].init(KEY, G, None))
    raw = PrefixTuning(P)
    again = raw(raw.init(KEY, G, produced))
    assert jax.tree.structure(again) == jax.tree.structure(produced)
    jax.tree.map(np.testing.assert_array_equal, again, produced)
    assert count(produced) == 2 * 3 * P * 2 * 8


@each_method
def test_random_starts_depend_on_the_seed(name):
    init = METHOD[name].init
    first, again, other = init(KEY, G, None), init(KEY, G, None), init(jax.random.key(9), G, None)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for a, b in zip(*map(jax.tree.leaves, (first, other)), strict=True):
        # Gates and memories start at zero.
        assert (a != b).any() or not a.any()


def test_random_starts_match_the_papers():
    def flat(method) -> np.ndarray:
        leaves = jax.tree.leaves(method.init(KEY, G, None))
        return np.concatenate([np.ravel(leaf) for leaf in leaves])

    assert flat(PrefixTuning(64)).std() == pytest.approx(1, abs=0.05)
    prompt = flat(PromptTuning(64))
    assert prompt.min() < -0.48
    assert 0.48 < prompt.max() <= 0.5
    mlp = PrefixTuning(64, mid_dim=9).init(KEY, G, None)["decoder"]
    assert 0.9 * 32**-0.5 < float(jnp.abs(mlp["in_DX"]).max()) <= 32**-0.5
    assert 0.9 / 3 < float(jnp.abs(mlp["out_XL2KH"]).max()) <= 1 / 3


def test_zero_and_normal_starts_have_the_right_statistics():
    for kind in (Embeds, Hidden, Prefix):
        nothing, noise = zeros(kind, G, P), normal(kind, G, P, KEY, std=0.5)
        assert isinstance(nothing, kind)
        assert jax.tree.structure(nothing) == jax.tree.structure(noise)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(nothing))
        assert float(jax.tree.leaves(noise)[0].std()) == pytest.approx(0.5, rel=0.2)
    keys_values = jax.tree.leaves(normal(Prefix, G, P, KEY, std=1.0))
    assert (keys_values[0] != keys_values[1]).any()


# Positions.


def test_text_starts_after_the_prefix_unless_text_position_is_set():
    def produced(**fields) -> Prefix:
        method = PrefixTuning(P, **fields)
        return method(method.init(KEY, G, None))

    assert (produced().text_position, produced().pinned) == (P, False)
    assert (
        produced(text_position=0, pinned=True).text_position,
        produced(text_position=0, pinned=True).pinned,
    ) == (
        0,
        True,
    )
    assert PrefixTuning(P).resolved_text_position == P
    assert PrefixTuning(P, text_position=0).resolved_text_position == 0
    assert PromptTuning(P).resolved_text_position == P


# Dropout.


@each_method
def test_dropout_zeroes_some_elements_and_rescales_the_others(name):
    length = {"length": 50} if METHOD[name].slots else {}
    method = dataclasses.replace(METHOD[name], dropout=0.25, **length)
    params = method.init(KEY, G, normal_like(method.blank(G), KEY, 1.0))
    whole, dropped = method(params), method(params, jax.random.key(3))
    for x, y in zip(*map(jax.tree.leaves, (whole, dropped)), strict=True):
        if not x.any():  # gates, which are never dropped
            continue
        zero = np.asarray(y == 0)
        assert zero.mean() == pytest.approx(0.25, abs=0.05)
        np.testing.assert_allclose(y[~zero], x[~zero] / 0.75, rtol=1e-5)
    again, other = method(params, jax.random.key(3)), method(params, jax.random.key(4))
    jax.tree.map(np.testing.assert_array_equal, dropped, again)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (dropped, other)), strict=True))


def test_dropout_of_keys_and_values_is_independent():
    method = PrefixTuning(50, dropout=0.5)
    inside = method(method.init(KEY, G, None), KEY).decoder.inside
    assert ((inside.k_LPKH == 0) != (inside.v_LPKH == 0)).any()


@each_method
def test_rng_has_no_effect_without_dropout(name):
    params = METHOD[name].init(KEY, G, None)
    jax.tree.map(np.testing.assert_array_equal, METHOD[name](params, KEY), METHOD[name](params))


# The registry.


def test_makes_methods_by_name():
    assert make_method({"name": "prefix", "length": 3, "mid_dim": 8}) == PrefixTuning(3, mid_dim=8)
    assert make_method({"name": "hidden"}) == HiddenPrefixTuning()
    assert make_method({"name": "prompt", "dropout": 0.1}) == PromptTuning(dropout=0.1)
    assert make_method({"name": "full"}) is None


@pytest.mark.parametrize("name", [*METHODS, "full"])
def test_name_of_inverts_make_method(name):
    assert name_of(make_method({"name": name})) == name


@pytest.mark.parametrize("method", [*METHOD.values(), None], ids=[*METHOD, "full"])
def test_section_round_trips_every_field(method):
    assert make_method(section_of(method)) == method


def test_rejects_an_unregistered_method():
    class Own(PrefixTuning):
        pass

    for describe in (name_of, section_of):
        with pytest.raises(
            ConfigError, match=r"Own is not registered in prefix_jax\.methods\.METHODS"
        ):
            describe(Own())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "prefx"}, "unknown method 'prefx'; did you mean 'prefix'? use one of prefix, "),
        ({"name": "zzz"}, "unknown method 'zzz'; use one of prefix, hidden, prompt, ptuning, "),
        ({"name": "prefix", "lenght": 3}, "method.lenght: unknown key; did you mean method.length"),
        ({"name": "prompt", "mid_dim": 3}, "method.mid_dim: unknown key"),
        ({"name": "prefix", "mid": 8}, "method.mid: renamed to method.mid_dim"),
        ({"name": "multitask", "tasks": ["a"]}, "method.tasks: renamed to method.datasets"),
        (
            {"name": "prefix", "length": "many"},
            r"method.length: must be an integer in .*, got 'many'",
        ),
        ({"name": "full", "length": 3}, "full has no fields, got length"),
        ({"name": "prefix", "length": 0}, r"method.length: must be an integer in \[1, .*, got 0"),
        ({"name": "prompt", "dropout": 1.0}, r"must be a number in \[0, 1\)"),
        (
            {"name": "prefix", "mid_dim": 10**9},
            r"method.mid_dim: must be an integer in \[1, 65536\] or null, got 1000000000",
        ),
        (
            {"name": "prefix", "text_position": -1},
            "method.text_position: must be a non-negative integer",
        ),
        ({"name": "prefix", "sites": []}, "method.sites is .*; list one or more of encoder, "),
        ({"name": "prefix", "sites": ["cross", "cross"]}, "each once"),
        ({"name": "prefix", "sites": ["middle"]}, "method.sites: must be a list of any of encoder"),
        ({"name": "prefix", "layers": [2, 1]}, "counted from 0 in ascending order"),
        ({"name": "plus", "layers": [-1]}, "counted from 0 in ascending order"),
        ({"name": "plus", "length": 3}, "method.length: unknown key"),
        ({"name": "ptuning", "encoder": "gru"}, "must be one of mlp, lstm"),
        (
            {"name": "ptuning", "hidden": 0},
            r"method.hidden: must be an integer in \[1, 65536\] or null, got 0",
        ),
        (
            {"name": "ptuning", "lstm_layers": 10**9},
            r"method.lstm_layers: must be an integer in \[1, 64\]",
        ),
        (
            {"name": "ptuning", "lstm_dropout": 1.0},
            r"method.lstm_dropout: must be a number in \[0, 1\), got 1",
        ),
        (
            {"name": "multitask", "ranks": 0},
            r"method.ranks: must be an integer in \[1, 65536\], got 0",
        ),
        (
            {"name": "multitask", "source_task": -1},
            "method.source_task: must be a non-negative integer",
        ),
        ({"name": "adapter", "layers": 0}, "method.layers must be at least 1, got 0"),
        ({"name": "adapter", "layers": [3, 3]}, "counted from 0 in ascending order"),
        ({"name": "cartridge", "length": 3, "frozen": 3}, "leave at least one slot trainable"),
    ],
)
def test_reports_invalid_sections(section, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        make_method(section)


def test_make_method_does_not_modify_the_section():
    section = {"name": "prefix", "length": 3}
    make_method(section)
    assert section == {"name": "prefix", "length": 3}


def test_prefix_length_is_its_number_of_slots():
    inside = KVPrefix(jnp.zeros((3, P, 2, 8)), jnp.zeros((3, P, 2, 8)))
    assert Prefix(Site(inside)).length == P
