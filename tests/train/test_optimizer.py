"""Schedules at exact steps, and optimizers restricted to the trained part."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prefix_jax.config import OptimConfig
from prefix_jax.errors import ConfigError
from prefix_jax.train.optimizer import make_optimizer, make_schedule
from prefix_jax.train.partition import labels

LABELS = {"backbone": {"w": "freeze", "n": "freeze"}, "prefix": {"k": "train", "v": "train"}}
PARAMS = {
    # The frozen part contains leaves that cannot be differentiated.
    "backbone": {"w": jnp.full((64, 64), 3.0, jnp.bfloat16), "n": jnp.arange(4, dtype=jnp.int8)},
    "prefix": {"k": jnp.array([1.0, -2.0]), "v": jnp.array([[0.5]])},
}
GRADS = {
    "backbone": {"w": jnp.full((64, 64), 1e6, jnp.bfloat16), "n": jnp.zeros(4, jnp.int8)},
    "prefix": {"k": jnp.array([3.0, 0.0]), "v": jnp.array([[-4.0]])},
}


def optimizer(**fields) -> optax.GradientTransformation:
    config = OptimConfig(**{"learning_rate": 0.1, "schedule": "constant", **fields})
    return make_optimizer(config, make_schedule(config, 10), LABELS)


def update(transform: optax.GradientTransformation, grads=GRADS):
    return transform.update(grads, transform.init(PARAMS), PARAMS)[0]


def rates(steps: int, **fields) -> list[float]:
    schedule = make_schedule(OptimConfig(learning_rate=2.0, **fields), steps)
    return [float(schedule(step)) for step in range(steps + 1)]


# Schedules.


def test_constant_schedule():
    assert rates(3, schedule="constant") == [2.0] * 4


def test_linear_schedule_reaches_zero_after_the_last_step():
    np.testing.assert_allclose(rates(4, schedule="linear"), [2.0, 1.5, 1.0, 0.5, 0.0], atol=1e-6)


def test_cosine_schedule_reaches_zero_after_the_last_step():
    expected = [1 + np.cos(np.pi * step / 4) for step in range(5)]
    np.testing.assert_allclose(rates(4, schedule="cosine"), expected, atol=1e-6)


def test_exponential_schedule_equals_pytorchs_per_epoch():
    learning_rates = rates(7, schedule="exponential", decay=0.5, decay_every=3)
    np.testing.assert_allclose(learning_rates, [2.0] * 3 + [1.0] * 3 + [0.5] * 2)
    learning_rates = rates(5, schedule="exponential", decay=0.5, decay_every=2, warmup_steps=2)
    np.testing.assert_allclose(learning_rates, [1.0, 2.0, 2.0, 2.0, 1.0, 1.0])


def test_names_what_an_exponential_schedule_lacks():
    with pytest.raises(ConfigError, match="exponential require each other"):
        OptimConfig(schedule="exponential")
    with pytest.raises(ConfigError, match="require each other"):
        OptimConfig(decay_every=3)
    with pytest.raises(ConfigError, match=r"decay: must be a number in \(0, 1\], got 0"):
        OptimConfig(schedule="exponential", decay_every=3, decay=0)


@pytest.mark.parametrize("after", ["constant", "linear", "cosine"])
def test_warmup_reaches_the_peak_and_starts_above_zero(after):
    learning_rates = rates(8, schedule=after, warmup_steps=4)
    np.testing.assert_allclose(learning_rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0], atol=1e-6)
    assert learning_rates[8] == pytest.approx(2.0 if after == "constant" else 0.0, abs=1e-6)


def test_warmup_of_one_step_and_of_all_steps():
    np.testing.assert_allclose(rates(2, schedule="constant", warmup_steps=1), [2.0] * 3)
    np.testing.assert_allclose(rates(2, schedule="linear", warmup_steps=2), [1.0, 2.0, 2.0])


# Partition.


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_frozen_leaves_have_zero_updates_and_no_state(name):
    transform = optimizer(name=name, weight_decay=0.1)
    updates = update(transform)
    leaves = map(jax.tree.leaves, (updates["backbone"], PARAMS["backbone"]))
    for leaf, like in zip(*leaves, strict=True):
        assert (leaf == 0).all()
        assert leaf.dtype == like.dtype
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(updates["prefix"]))
    # At most two moments of the trained part, and counters.
    state = jax.tree.leaves(transform.init(PARAMS))
    trained = [leaf.shape for leaf in jax.tree.leaves(PARAMS["prefix"])]
    assert {leaf.shape for leaf in state} <= {*trained, (), (1,)}
    assert sum(leaf.size for leaf in state) <= 2 * 3 + 6
    assert {leaf.dtype for leaf in state} <= {jnp.dtype("float32"), jnp.dtype("int32")}


def test_clips_by_the_norm_of_the_trained_part():
    """Its norm is 5. With the frozen part, in the millions, the update would vanish."""
    sgd = {"b1": 0.0, "b2": 0.0, "eps": 1e8}  # AdamW whose step is the gradient / eps
    whole, clipped = (
        update(optimizer(clip_norm=None, **sgd)),
        update(optimizer(clip_norm=1.0, **sgd)),
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 5 * b, rtol=1e-5),
        whole["prefix"],
        clipped["prefix"],
    )
    generous = update(optimizer(clip_norm=5.1, **sgd))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        whole["prefix"],
        generous["prefix"],
    )


# Weight decay.


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weight_decay_is_decoupled_and_scaled_by_the_learning_rate(name):
    plain = update(optimizer(name=name, clip_norm=None))
    decayed = update(optimizer(name=name, clip_norm=None, weight_decay=0.3))
    jax.tree.map(
        lambda a, b, x: np.testing.assert_allclose(b - a, -0.1 * 0.3 * x, rtol=1e-4, atol=1e-7),
        plain["prefix"],
        decayed["prefix"],
        PARAMS["prefix"],
    )


def test_adafactor_equals_optax_without_scaling_and_factoring():
    params, grads = PARAMS["prefix"], GRADS["prefix"]
    reference = optax.adafactor(0.1, factored=False, multiply_by_parameter_scale=False)
    ours = optimizer(name="adafactor", clip_norm=None)
    state, whole_state = reference.init(params), ours.init(PARAMS)
    for scale in (1.0, 0.1, 7.0):
        scaled = jax.tree.map(lambda leaf, s=scale: s * leaf, grads)
        expected, state = reference.update(scaled, state, params)
        updates, whole_state = ours.update({**GRADS, "prefix": scaled}, whole_state, PARAMS)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates["prefix"], expected
        )


# Heads.


@pytest.mark.parametrize("clip", [None, 0.5])
def test_head_has_its_own_learning_rate_and_shares_the_norm(clip):
    params = {**PARAMS, "head": {"out_DY": jnp.ones((2, 3))}}
    grads = {**GRADS, "head": {"out_DY": jnp.full((2, 3), 0.7)}}
    partition = labels(params)
    config = OptimConfig(clip_norm=clip, schedule="constant", learning_rate=0.1, eps=1e-2)
    optimizers = (
        make_optimizer(config, lambda _: 0.1, partition),
        make_optimizer(config, lambda _: 0.1, partition, lambda _: 0.002),
    )
    (same, _), (separate, _) = (o.update(grads, o.init(params), params) for o in optimizers)
    jax.tree.map(np.testing.assert_array_equal, separate["prefix"], same["prefix"])
    np.testing.assert_allclose(separate["head"]["out_DY"], same["head"]["out_DY"] / 50, rtol=1e-5)
    assert not any(leaf.any() for leaf in jax.tree.leaves(separate["backbone"]))
