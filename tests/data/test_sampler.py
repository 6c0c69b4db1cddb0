import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_jax.data.sampler import EpochSampler
from prefix_jax.errors import ConfigError


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.booleans())
def test_every_epoch_has_every_example_once(count, size, seed, grouped):
    groups = [i % 3 for i in range(count)] if grouped else None
    order = EpochSampler(count, size, seed=seed, groups=groups)
    flat = np.concatenate([order.step(s) for s in range(3 * order.steps_per_epoch)])
    for epoch in range(3 * order.steps_per_epoch * size // count):
        held = flat[epoch * count : (epoch + 1) * count]
        assert sorted(held.tolist()) == list(range(count))


def test_step_depends_only_on_seed_and_step():
    a, b = EpochSampler(100, 8, seed=3), EpochSampler(100, 8, seed=3)
    steps = [a.step(s).tolist() for s in range(50)]
    assert [b.step(s).tolist() for s in reversed(range(50))] == steps[::-1]
    assert EpochSampler(100, 8, seed=4).step(0).tolist() != steps[0]


def test_epochs_differ():
    order = EpochSampler(64, 64)
    assert order.step(0).tolist() != order.step(1).tolist()


def test_groups_stay_adjacent_and_are_shuffled():
    groups = [0, 1, 2, 3, 4] * 6
    order = EpochSampler(30, 30, groups=groups)
    epochs = [order.step(s) for s in range(8)]
    for held in epochs:
        names = [groups[i] for i in held]
        assert sum(a != b for a, b in itertools.pairwise(names)) == 4
    assert len({tuple(groups[i] for i in held) for held in epochs}) > 1
    assert len({tuple(i for i in held if groups[i] == 0) for held in epochs}) > 1


def test_steps_per_epoch_includes_last_partial_step():
    assert EpochSampler(16, 8).steps_per_epoch == 2
    assert EpochSampler(17, 8).steps_per_epoch == 3


@pytest.mark.parametrize(("count", "size"), [(0, 8), (8, 0)])
def test_rejects_empty_order(count, size):
    with pytest.raises(ConfigError, match="must be at least 1"):
        EpochSampler(count, size)
