"""Prefix tuning by hidden states: P trained vectors stand before the tokens in every layer."""

from __future__ import annotations

import dataclasses

import jax

from prefix_jax.methods.base import Method, Params, normal
from prefix_jax.prefix import Geometry, Hidden


@dataclasses.dataclass(frozen=True)
class HiddenPrefixTuning(Method[Hidden]):
    """Trains P × D hidden states per layer.

    They are prepended to the sequence at the entry of every layer, whose frozen norm and
    projections make their keys and values; what the layer outputs at those positions is replaced
    by the next layer's vectors. So training moves along directions that the frozen model already
    reads, and a layer costs P · D numbers instead of 2 · P · K · H.
    """

    produces = Hidden

    def init(self, rng: jax.Array, geometry: Geometry, start: Hidden | None) -> Params:
        start = start or normal(Hidden, geometry, self.length, rng, std=1.0)
        return {"h_LPD": start.h_LPD}

    def __call__(self, params: Params, rng: jax.Array | None = None) -> Hidden:
        return Hidden(self.drop(params["h_LPD"], rng))
