"""Reads rotary positions from a configuration, in its newer and its older spelling.

Precedence follows `convert_rope_params_to_dict` and `standardize_rope_params` in
transformers 5.10 to 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prefix_jax.errors import BackboneError
from prefix_jax.nn.rotary import Rotary

_SCALINGS = ("linear", "llama3", "yarn")


def read_rotary(
    config: Mapping[str, Any],
    *,
    theta_key: str = "rope_theta",
    share_key: str | None = None,
    share: float = 1.0,
) -> Rotary:
    """Reads the rotary positions of a model whose layers have the same ones.

    `rope_scaling`, unless empty, replaces `rope_parameters`. Their values take precedence over
    top-level ones, except for `original_max_position_embeddings`, where the top level wins.

    Args:
        config: the content of a `config.json`.
        theta_key: the top-level key of theta.
        share_key: the top-level key of the share of each head that rotates; None if heads rotate
            as a whole.
        share: the default share.

    Raises:
        BackboneError: the scaling is not supported, or transformers would not accept these keys.
    """
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if nested := sorted(key for key, value in rope.items() if isinstance(value, Mapping)):
        raise BackboneError(
            f"rope_parameters by kind of layer ({', '.join(nested)}) are only supported for "
            "Gemma 3; expected one set of parameters for all layers"
        )
    rope.setdefault("rope_theta", config.get(theta_key, 10000.0))
    top_level = config.get("partial_rotary_factor")
    if share_key is None:
        if top_level is not None:
            rope.setdefault("partial_rotary_factor", top_level)
        share = 1.0
        _refuse_partial(rope)
    else:
        share = rope.get("partial_rotary_factor", config.get(share_key, share))
        if top_level is not None and top_level != share:
            raise BackboneError(
                f"partial_rotary_factor is {top_level}, but rope_parameters or {share_key} gives "
                f"{share}, and versions of transformers differ in which they use; remove one"
            )
    if "original_max_position_embeddings" in config:
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return _rotary(rope, config, share)


def read_rotary_of_layers(
    config: Mapping[str, Any], thetas: Mapping[str, tuple[str, float]]
) -> dict[str, Rotary]:
    """Reads the rotary positions of a model with several kinds of layers (Gemma 3).

    `rope_scaling` is added to the parameters of full attention.

    Args:
        config: the content of a `config.json`.
        thetas: the top-level key of theta and the default, for every kind of layer.

    Raises:
        BackboneError: the scaling is not supported, or transformers would not accept these keys.
    """
    by_kind = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling")
    if scaling is not None and by_kind and not by_kind.get("full_attention"):
        raise BackboneError(
            "rope_scaling is given next to rope_parameters without full_attention, which "
            "transformers does not accept; put it into rope_parameters.full_attention"
        )
    rotaries = {}
    for kind, (key, default) in thetas.items():
        rope = dict(by_kind.get(kind) or {})
        if scaling is not None and kind == "full_attention":
            rope |= scaling
            if "type" in scaling and "rope_type" not in scaling:
                raise BackboneError(
                    f"rope_scaling has type {scaling['type']!r} but no rope_type, without which "
                    "transformers 5 does not scale; rename type to rope_type"
                )
        rope.setdefault("rope_theta", config.get(key, default))
        _refuse_partial({"partial_rotary_factor": config.get("partial_rotary_factor"), **rope})
        rotaries[kind] = _rotary(rope, config, 1.0)
    return rotaries


def _kind(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _refuse_partial(rope: Mapping[str, Any]) -> None:
    """Rejects partial rotation combined with scaling in models that rotate whole heads, on which
    transformers fails. Without scaling, transformers ignores the key."""
    factor = rope.get("partial_rotary_factor")
    if _kind(rope) != "default" and factor is not None and factor != 1:
        raise BackboneError(
            f"partial_rotary_factor is {factor} with rope scaling {_kind(rope)!r}; this model "
            "rotates whole heads, expected 1 or no such key"
        )


def _rotary(rope: Mapping[str, Any], config: Mapping[str, Any], share: float) -> Rotary:
    """The rotary positions of one set of parameters, which includes theta."""
    kind, theta = _kind(rope), rope["rope_theta"]
    if kind == "default":
        return Rotary(theta, share=share)
    if kind not in _SCALINGS:
        raise BackboneError(
            f"rope scaling {kind!r} is not supported; supported: default, {', '.join(_SCALINGS)}"
        )
    factor = rope["factor"]
    if kind == "linear":
        return Rotary(theta, "linear", factor, share=share)
    longest = config["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings") or longest
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
    if factor is None:
        factor = longest / original
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
