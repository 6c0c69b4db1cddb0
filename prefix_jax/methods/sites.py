"""What methods share that train something for each attention: which attentions, which layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from prefix_jax.errors import ConfigError
from prefix_jax.methods.base import Method
from prefix_jax.prefix import SITES, Geometry, Layers, Prefix, Site, SiteName, SiteShape


@dataclasses.dataclass(frozen=True)
class SiteMethod(Method[Prefix]):
    """Trains a part for every chosen attention, in every chosen layer of it.

    Attributes:
        sites: which attentions get one: "encoder", "decoder", "cross"; None for all that the
            backbone has.
        layers: which layers get one, counted from 0; None for all.
    """

    sites: tuple[SiteName, ...] | None = None
    layers: tuple[int, ...] | None = None

    produces = Prefix

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sites is not None and (not self.sites or len(set(self.sites)) < len(self.sites)):
            raise ConfigError(
                f"method.sites is {list(self.sites)}; name one or more of {', '.join(SITES)}, each "
                "once, or give null for all that the backbone has"
            )
        check_layers(self.layers)

    def shapes(self, geometry: Geometry) -> dict[SiteName, SiteShape]:
        """The chosen attentions of a backbone, each with as many layers as are chosen.

        Raises:
            ConfigError: the backbone has no such site, or no such layer.
        """
        found: dict[SiteName, SiteShape] = {}
        for name in geometry.sites if self.sites is None else self.sites:
            if name not in geometry.sites:
                raise ConfigError(
                    f"method.sites names {name!r}; this backbone has {', '.join(geometry.sites)}"
                )
            shape = geometry.sites[name]
            check_layers(self.layers, shape.layers, f"at the site {name!r} ")
            count = shape.layers if self.layers is None else len(self.layers)
            found[name] = dataclasses.replace(shape, layers=count)
        return found

    def chosen(self, site: Site) -> Site:
        """The chosen layers of a site that is of all layers, or of these already."""
        return Site(
            join=pick_layers(site.join, site.layers, self.layers),
            beside=pick_layers(site.beside, site.layers, self.layers),
            layers=self.layers,
        )


def check_layers(layers: Layers, count: int | None = None, where: str = "") -> None:
    """Checks a choice of layers by itself and, given their count, against a backbone.

    Raises:
        ConfigError: it is empty or not ascending, or the backbone has no such layer.
    """
    if layers is None:
        return
    if not layers or layers[0] < 0 or list(layers) != sorted(set(layers)):
        raise ConfigError(
            f"method.layers is {list(layers)}; give layers counted from 0 in ascending order, or "
            "null for all"
        )
    if count is not None and layers[-1] >= count:
        raise ConfigError(
            f"method.layers names layer {layers[-1]}; {where}this backbone has 0 to {count - 1}"
        )


def pick_layers(arrays: Any, of: Layers, wanted: Layers) -> Any:
    """Arrays with a leading axis of the layers `of` (None: all), at the wanted layers alone."""
    if of == wanted or wanted is None:
        return arrays
    index = jnp.array(wanted)

    def pick(leaf: jax.Array) -> jax.Array:
        return leaf[index]

    return jax.tree.map(pick, arrays)
