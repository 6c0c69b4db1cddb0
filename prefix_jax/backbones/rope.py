"""Reads what a configuration says of rotary positions, in its newer and its older spelling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prefix_jax.errors import BackboneError
from prefix_jax.nn.rotary import Rotary

_SCALINGS = ("linear", "llama3", "yarn")


def read_rotary(config: Mapping[str, Any], share: float = 1.0) -> Rotary:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Args:
        config: of a model all of whose layers turn alike.
        share: of a head's dimensions that turn, where the configuration does not say.

    Raises:
        BackboneError: the scaling is of a kind that is not computed here.
    """
    rope = config.get("rope_parameters") or {}
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **rope}
    rope |= config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta, share = rope["rope_theta"], rope.get("partial_rotary_factor", share)
    if kind == "default":
        return Rotary(theta, share=share)
    if kind not in _SCALINGS:
        raise BackboneError(
            f"rope scaling {kind!r} is not supported; supported: default, {', '.join(_SCALINGS)}"
        )
    factor = rope["factor"]
    original = rope.get("original_max_position_embeddings") or config.get(
        "max_position_embeddings", 2048
    )
    if kind == "linear":
        return Rotary(theta, "linear", factor, share=share)
    if kind == "llama3":
        return Rotary(
            theta,
            "llama3",
            factor,
            original,
            low=rope["low_freq_factor"],
            high=rope["high_freq_factor"],
            share=share,
        )
    return Rotary(
        theta,
        "yarn",
        factor,
        original,
        low=rope.get("beta_slow") or 1.0,
        high=rope.get("beta_fast") or 32.0,
        attention=_yarn_attention(rope, factor),
        truncate=rope.get("truncate", True),
        share=share,
    )


def _yarn_attention(rope: Mapping[str, Any], factor: float) -> float:
    """Yarn's temperature on the logits, as a factor of cos and sin."""

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return temperature(1.0)
