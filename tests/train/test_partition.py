"""One label per leaf determines what trains."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from prefix_jax.train.partition import labels, merge, split

PARAMS = {
    "backbone": {"embed": {"tokens_VD": 1}, "layers": ({"q_DNH": 2}, {"q_DNH": 3})},
    "prefix": {"k_LPKH": 4, "v_LPKH": 5},
}


def test_everything_but_the_backbone_trains():
    assert labels(PARAMS) == {
        "backbone": {
            "embed": {"tokens_VD": "freeze"},
            "layers": ({"q_DNH": "freeze"}, {"q_DNH": "freeze"}),
        },
        "prefix": {"k_LPKH": "train", "v_LPKH": "train"},
    }


def test_leaves_below_frozen_do_not_train():
    params = {"backbone": 1, "prefix": {"decoder": {"frozen": {"k": 2}, "trained": {"k": 3}}}}
    partition = labels(params)
    assert partition["prefix"]["decoder"] == {"frozen": {"k": "freeze"}, "trained": {"k": "train"}}
    train, frozen = split(params, partition)
    assert (jax.tree.leaves(train), jax.tree.leaves(frozen)) == ([3], [1, 2])


def test_everything_trains_in_full_fine_tuning():
    assert set(jax.tree.leaves(labels(PARAMS, full=True))) == {"train"}


def test_labels_abstract_parameters():
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.float32, PARAMS))
    assert labels(abstract) == labels(PARAMS)


@pytest.mark.parametrize("full", [False, True])
def test_split_and_merge_are_inverse(full):
    train, frozen = split(PARAMS, labels(PARAMS, full))
    assert sorted(jax.tree.leaves(train) + jax.tree.leaves(frozen)) == [1, 2, 3, 4, 5]
    assert jax.tree.leaves(train) == ([1, 2, 3, 4, 5] if full else [4, 5])
    assert merge(train, frozen) == PARAMS
    assert merge(frozen, train) == PARAMS


def test_differentiates_only_the_trained_part():
    params = jax.tree.map(jnp.float32, PARAMS) | {"backbone": {"ids": jnp.int32(3)}}
    train, frozen = split(params, labels(params))
    grads = jax.grad(lambda train: sum(jax.tree.leaves(merge(train, frozen))) * 1.0)(train)
    assert grads == {"backbone": {"ids": None}, "prefix": {"k_LPKH": 1.0, "v_LPKH": 1.0}}
