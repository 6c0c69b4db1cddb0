"""Prefix tuning by hidden states: P trained vectors precede the tokens in every layer."""

from __future__ import annotations

import dataclasses

import jax

from prefix_jax.methods.base import Method, Params, normal
from prefix_jax.prefix import Geometry, Hidden


@dataclasses.dataclass(frozen=True)
class HiddenPrefixTuning(Method[Hidden]):
    """Trains P × D hidden states per layer.

    The states are prepended to the input of every layer, whose frozen norm and projections compute
    their keys and values. The layer's output at these positions is replaced by the states of the
    next layer. Training therefore moves along directions that the frozen model already reads, and
    a layer has P · D parameters instead of 2 · P · K · H.
    """

    produces = Hidden

    def init(self, rng: jax.Array, geometry: Geometry, start: Hidden | None) -> Params:
        start = start or normal(Hidden, geometry, self.length, rng, std=1.0)
        return {"h_LPD": start.h_LPD}

    def __call__(self, params: Params, rng: jax.Array | None = None) -> Hidden:
        return Hidden(self.drop(params["h_LPD"], rng))
