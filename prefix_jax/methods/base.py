"""What a method is: a few trained arrays, and how they become a prefix."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

import jax
import jax.numpy as jnp

from prefix_jax.prefix import (
    Adapter,
    Embeds,
    Geometry,
    Hidden,
    KVPrefix,
    Prefix,
    Produced,
    Site,
)
from prefix_jax.typed import Fraction, Size, check_fields

Params = Mapping[str, Any]

# What a method produces.
ProducedT = TypeVar("ProducedT", bound=Produced)


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC, Generic[ProducedT]):
    """A way to produce a prefix from trained parameters. Subclasses are configs and code in one.

    Attributes:
        length: P, the number of prefix slots.
        dropout: the probability with which an element of what is produced is zeroed in training,
            the others scaled up (P-tuning v2, Liu et al. 2022).
    """

    length: Size = 16
    dropout: Fraction = 0.0

    produces: ClassVar[type[Embeds] | type[Hidden] | type[Adapter] | type[Prefix]]
    # Whether there are slots: what has none (Prefix-Tuning+) cannot start as a text.
    slots: ClassVar[bool] = True
    # What `init.start` is where a config does not say.
    default_start: ClassVar[Literal["text", "random"]] = "text"

    def __post_init__(self) -> None:
        check_fields(self, "method")

    @property
    def draws(self) -> bool:
        """Whether training draws random numbers."""
        return self.dropout > 0

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks of which each gets a prefix of its own; none if there is one for all text.

        What the method produces is then a bank, in this order.
        """
        return ()

    @property
    def text_start(self) -> int:
        """The position of the first token of text after the prefix."""
        return self.length

    @abc.abstractmethod
    def init(self, rng: jax.Array, geometry: Geometry, start: ProducedT | None) -> Params:
        """The initial parameters, float32.

        Args:
            rng: for what is random.
            geometry: of the backbone.
            start: what to produce at first, in the type that this method produces; None for the
                random initialisation of the method's own source.
        """

    @abc.abstractmethod
    def __call__(self, params: Params, rng: jax.Array | None = None) -> ProducedT:
        """What the parameters stand for. With `rng`, dropout is applied: training only."""

    def blank(self, geometry: Geometry) -> ProducedT:
        """A start that is zero everywhere."""
        return cast(ProducedT, zeros(self.produces, geometry, self.length))

    def drop(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        """`x` under the method's dropout."""
        if rng is None or self.dropout == 0:
            return x
        keep = jax.random.bernoulli(rng, 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), 0)


def zeros(kind: type[ProducedT], geometry: Geometry, length: int) -> ProducedT:
    """A start that is zero everywhere; of keys and values, at every site that there is."""
    g = geometry
    start: Produced
    if kind is Embeds:
        start = Embeds(jnp.zeros((length, g.input_dim)))
    elif kind is Hidden:
        start = Hidden(jnp.zeros((g.main.layers, length, g.d_model)))
    elif kind is Adapter:
        gate_LN = jnp.zeros((g.main.layers, g.main.query_heads))
        start = Adapter(jnp.zeros((g.main.layers, length, g.d_model)), gate_LN)
    else:
        sites = {}
        for name, site in g.sites.items():
            shape = (site.layers, length, site.kv_heads, site.head_dim)
            sites[name] = Site(KVPrefix(jnp.zeros(shape), jnp.zeros(shape)))
        start = Prefix.of(sites, offset=length)
    return cast(ProducedT, start)


def normal(
    kind: type[ProducedT], geometry: Geometry, length: int, rng: jax.Array, std: float
) -> ProducedT:
    """A start drawn from a normal distribution around zero."""
    return normal_like(zeros(kind, geometry, length), rng, std)


def normal_like(blank: ProducedT, rng: jax.Array, std: float) -> ProducedT:
    """A start of this shape drawn from a normal distribution around zero. Gates stay at zero."""
    leaves, treedef = jax.tree.flatten(blank)
    rngs = jax.random.split(rng, len(leaves))
    drawn = [
        std * jax.random.normal(key, leaf.shape) for key, leaf in zip(rngs, leaves, strict=True)
    ]
    start: Any = jax.tree.unflatten(treedef, drawn)
    if isinstance(start, Adapter):
        start = dataclasses.replace(start, gate_LN=jnp.zeros_like(start.gate_LN))
    return cast(ProducedT, start)


def torch_linear(rng: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """The default of `torch.nn.Linear`, which the original codes leave in place."""
    bound = fan_in**-0.5
    return jax.random.uniform(rng, shape, minval=-bound, maxval=bound)
