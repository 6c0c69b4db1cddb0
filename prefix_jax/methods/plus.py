"""Prefix-Tuning+: the prefix moved out of the softmax (Wang et al. 2025)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from prefix_jax.methods.base import Params
from prefix_jax.methods.sites import SiteMethod
from prefix_jax.prefix import SITES, Geometry, Memory, Prefix, Site, SiteName


@dataclasses.dataclass(frozen=True)
class PrefixTuningPlus(SiteMethod):
    """Trains an H × H matrix M per query head, and adds elu(q) M to the output of the head.

    Inside the softmax, a prefix competes with the text for attention, and the longer the text, the
    less the prefix receives. The paper moves the sum over the slots out of the softmax and replaces
    it by the matrix to which linear attention would reduce it. The method therefore has no slots
    and no length. The matrices start at zero, so training starts exactly from the bare model.
    Queries are used after rotation, as in attention.
    """

    length: int = dataclasses.field(default=0, init=False)

    slots = False
    default_start = "random"

    @property
    def resolved_text_position(self) -> int:
        return 0

    def blank(self, geometry: Geometry) -> Prefix:
        sites: dict[SiteName, Site] = {}
        for name, shape in self.shapes(geometry).items():
            size = (shape.layers, shape.query_heads, shape.head_dim, shape.head_dim)
            sites[name] = Site(outside=Memory(jnp.zeros(size)), layers=self.layers)
        return Prefix.of(sites)

    def init(self, rng: jax.Array, geometry: Geometry, start: Prefix | None) -> Params:
        """Initialises the memories, with those of `start` or zeros.

        Raises:
            ConfigError: the backbone lacks a chosen site or layer.
        """
        start = start or self.blank(geometry)
        params: dict[str, Params] = {}
        for name in self.shapes(geometry):
            outside = start.sites[name].outside
            assert isinstance(outside, Memory), "the start of this method must be a Memory"
            params[name] = {"m_LNHH": outside.m_LNHH}
        return params

    def __call__(self, params: Params, rng: jax.Array | None = None) -> Prefix:
        sites: dict[SiteName, Site] = {}
        for number, name in enumerate(name for name in SITES if name in params):
            site_rng = None if rng is None else jax.random.fold_in(rng, number)
            memory = Memory(self.drop(params[name]["m_LNHH"], site_rng))
            sites[name] = Site(outside=memory, layers=self.layers)
        return Prefix.of(sites)
