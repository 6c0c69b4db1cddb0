"""What trains and what is frozen, said once."""

from __future__ import annotations

from typing import Any, Literal

import jax

Label = Literal["train", "freeze"]


def labels(params: Any, full: bool = False) -> Any:
    """The label of every leaf of {"backbone": …, "prefix": …, "head": …}.

    The optimizer, the step, checkpoints and reports all go by these labels. Of what a method makes,
    all trains but what stands under a key "frozen" (a cartridge's first slots).

    Args:
        params: the (abstract) parameters.
        full: train the backbone too: full fine-tuning.
    """

    def label(path: tuple[Any, ...], _: Any) -> Label:
        frozen = path[0].key == "backbone" or any(
            getattr(part, "key", None) == "frozen" for part in path
        )
        return "freeze" if frozen and not full else "train"

    return jax.tree_util.tree_map_with_path(label, params)


def part_of(params: Any) -> Any:
    """Whether each leaf is of the "head", or of the "prefix" and what else may train."""

    def name(path: tuple[Any, ...], _: Any) -> Literal["prefix", "head"]:
        return "head" if path[0].key == "head" else "prefix"

    return jax.tree_util.tree_map_with_path(name, params)


def split(params: Any, labels: Any) -> tuple[Any, Any]:
    """The trained and the frozen part: two trees of one shape, each with None in its holes."""
    train = jax.tree.map(lambda label, leaf: leaf if label == "train" else None, labels, params)
    frozen = jax.tree.map(lambda label, leaf: leaf if label == "freeze" else None, labels, params)
    return train, frozen


def merge(train: Any, frozen: Any) -> Any:
    """The whole tree again."""
    return jax.tree.map(
        lambda left, right: right if left is None else left,
        train,
        frozen,
        is_leaf=lambda leaf: leaf is None,
    )
