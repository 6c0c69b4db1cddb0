"""What a method is: a few trained arrays, and how they become a prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from prefix_jax.errors import ConfigError
from prefix_jax.prefix import Embeds, Geometry, Hidden, KVPrefix, Prefix, Produced, Site

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to produce a prefix from trained parameters. Subclasses are configs and code in one.

    Attributes:
        length: P, the number of prefix slots.
        dropout: the probability with which an element of what is produced is zeroed in training,
            the others scaled up (P-tuning v2, Liu et al. 2022).
    """

    length: int = 16
    dropout: float = 0.0

    produces: ClassVar[type[Embeds] | type[Hidden] | type[Prefix]]

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"method.length is {self.length}; a prefix needs at least 1 slot")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"method.dropout is {self.dropout}; it must be in [0, 1)")

    @property
    def text_start(self) -> int:
        """The position of the first token of text after the prefix."""
        return self.length

    def init(self, rng: jax.Array, geometry: Geometry, start: Produced | None) -> Params:
        """The initial parameters, float32.

        Args:
            rng: for what is random.
            geometry: of the backbone.
            start: what to produce at first, in the type that this method produces; None for the
                random initialisation of the method's own source.
        """
        raise NotImplementedError

    def __call__(self, params: Params, rng: jax.Array | None = None) -> Produced:
        """What the parameters stand for. With `rng`, dropout is applied: training only."""
        raise NotImplementedError

    def drop(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        """`x` under the method's dropout."""
        if rng is None or self.dropout == 0:
            return x
        keep = jax.random.bernoulli(rng, 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), 0)


def constant(
    kind: type[Embeds] | type[Hidden] | type[Prefix], geometry: Geometry, length: int
) -> Produced:
    """A start that is zero everywhere."""
    g = geometry
    if kind is Embeds:
        return Embeds(jnp.zeros((length, g.d_model)))
    if kind is Hidden:
        return Hidden(jnp.zeros((g.layers, length, g.d_model)))
    pair = (jnp.zeros((g.layers, length, g.kv_heads, g.head_dim)) for _ in range(2))
    return Prefix(Site(KVPrefix(*pair)), offset=length)


def normal(
    kind: type[Embeds] | type[Hidden] | type[Prefix],
    geometry: Geometry,
    length: int,
    rng: jax.Array,
    std: float,
) -> Produced:
    """A start drawn from a normal distribution around zero."""
    leaves, treedef = jax.tree.flatten(constant(kind, geometry, length))
    rngs = jax.random.split(rng, len(leaves))
    return treedef.unflatten(
        std * jax.random.normal(key, leaf.shape) for key, leaf in zip(rngs, leaves, strict=True)
    )
