"""Prompt tuning: soft tokens before the input embeddings (Lester et al. 2021)."""

from __future__ import annotations

import dataclasses

import jax

from prefix_jax.methods.base import Method, Params
from prefix_jax.prefix import Embeds, Geometry


@dataclasses.dataclass(frozen=True)
class PromptTuning(Method[Embeds]):
    """Trains P soft tokens, each as wide as the input embeddings."""

    produces = Embeds

    def init(self, rng: jax.Array, geometry: Geometry, start: Embeds | None) -> Params:
        if start is None:
            # The paper's random initialisation.
            shape = (self.length, geometry.input_dim)
            start = Embeds(jax.random.uniform(rng, shape, minval=-0.5, maxval=0.5))
        return {"x_PD": start.x_PD}

    def __call__(self, params: Params, rng: jax.Array | None = None) -> Embeds:
        return Embeds(self.drop(params["x_PD"], rng))
