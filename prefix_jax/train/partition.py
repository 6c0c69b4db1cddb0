"""Single source of truth for trainable and frozen parameters."""

from __future__ import annotations

from typing import Any, Literal

import jax

from prefix_jax.errors import ConfigError

Label = Literal["train", "freeze"]


def labels(params: Any, full: bool = False) -> Any:
    """Labels every leaf of {"backbone": …, "prefix": …, "head": …}.

    The optimizer, the step, checkpoints and reports all use these labels. A method's parameters
    train, except those under a key "frozen" (a cartridge's first slots).

    Args:
        params: the parameters, which may be abstract.
        full: also train the backbone (full fine-tuning).
    """

    def label(path: tuple[Any, ...], _: Any) -> Label:
        frozen = path[0].key == "backbone" or any(
            getattr(part, "key", None) == "frozen" for part in path
        )
        return "freeze" if frozen and not full else "train"

    return jax.tree_util.tree_map_with_path(label, params)


def part_of(params: Any) -> Any:
    """Labels every leaf "head" or, for anything else that may train, "prefix"."""

    def name(path: tuple[Any, ...], _: Any) -> Literal["prefix", "head"]:
        return "head" if path[0].key == "head" else "prefix"

    return jax.tree_util.tree_map_with_path(name, params)


def split(params: Any, labels: Any) -> tuple[Any, Any]:
    """Splits a tree into trained and frozen leaves; each part has None in place of the others."""
    train = jax.tree.map(lambda label, leaf: leaf if label == "train" else None, labels, params)
    frozen = jax.tree.map(lambda label, leaf: leaf if label == "freeze" else None, labels, params)
    return train, frozen


def merge(train: Any, frozen: Any) -> Any:
    """The inverse of `split`."""
    return jax.tree.map(
        lambda left, right: right if left is None else left,
        train,
        frozen,
        is_leaf=lambda leaf: leaf is None,
    )


def check_trainable(full: bool, quantize: str) -> None:
    """Raises ConfigError if a run would train quantized weights.

    Args:
        full: whether the run trains the backbone.
        quantize: the setting `model.quantize`.
    """
    if full and quantize != "none":
        raise ConfigError(
            "method: full trains the weights themselves, which cannot be integers; remove "
            f"model.quantize ({quantize}), or train a prefix"
        )
