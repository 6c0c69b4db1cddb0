"""Base class of methods: trained parameters, and a function from them to a prefix."""

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
from prefix_jax.validation import Fraction, Size, check_fields

Params = Mapping[str, Any]

# The type that a method produces.
ProducedT = TypeVar("ProducedT", bound=Produced)


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC, Generic[ProducedT]):
    """Computes a prefix from trained parameters. The fields of a subclass are its config section.

    Attributes:
        length: P, the number of prefix slots.
        dropout: dropout rate on the produced prefix during training (P-tuning v2, Liu et al. 2022).
    """

    length: Size = 16
    dropout: Fraction = 0.0

    produces: ClassVar[type[Embeds] | type[Hidden] | type[Adapter] | type[Prefix]]
    # False if the method has no slots (Prefix-Tuning+), so that it cannot start from a text.
    slots: ClassVar[bool] = True
    # The default of `init.start`.
    default_start: ClassVar[Literal["text", "random"]] = "text"

    def __post_init__(self) -> None:
        check_fields(self, "method")

    @property
    def draws(self) -> bool:
        """True if training draws random numbers."""
        return self.dropout > 0

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """The datasets with one prefix each, in the bank's order; empty for a single prefix."""
        return ()

    @property
    def resolved_text_position(self) -> int:
        """The position of the first token of text after the prefix."""
        return self.length

    @abc.abstractmethod
    def init(self, rng: jax.Array, geometry: Geometry, start: ProducedT | None) -> Params:
        """Initialises the parameters, float32.

        Args:
            rng: for random values.
            geometry: geometry of the backbone.
            start: the value to produce at initialisation; None for the random initialisation of the
                method's paper or reference code.
        """

    @abc.abstractmethod
    def __call__(self, params: Params, rng: jax.Array | None = None) -> ProducedT:
        """Computes the method's output. Dropout is applied if `rng` is given, in training."""

    def blank(self, geometry: Geometry) -> ProducedT:
        """A start of zeros."""
        return cast(ProducedT, zeros(self.produces, geometry, self.length))

    def drop(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        """Applies the method's dropout."""
        if rng is None or self.dropout == 0:
            return x
        keep = jax.random.bernoulli(rng, 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), 0)


def zeros(kind: type[ProducedT], geometry: Geometry, length: int) -> ProducedT:
    """A start of zeros; for keys and values, at every site of the backbone."""
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
        start = Prefix.of(sites, text_position=length)
    return cast(ProducedT, start)


def normal(
    kind: type[ProducedT], geometry: Geometry, length: int, rng: jax.Array, std: float
) -> ProducedT:
    """A start drawn from a zero-mean normal distribution."""
    return normal_like(zeros(kind, geometry, length), rng, std)


def normal_like(blank: ProducedT, rng: jax.Array, std: float) -> ProducedT:
    """A start shaped like `blank`, drawn from a zero-mean normal distribution. Gates are zero."""
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
    """The default initialisation of `torch.nn.Linear`, which the reference codes use."""
    bound = fan_in**-0.5
    return jax.random.uniform(rng, shape, minval=-bound, maxval=bound)
