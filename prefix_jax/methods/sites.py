"""Base class of methods that train parameters per site: the choice of sites and layers."""

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
    """A method with parameters for every chosen site and layer.

    Attributes:
        sites: the attentions to tune: "encoder", "decoder", "cross"; None for all that the backbone
            has.
        layers: the layers to tune, counted from 0; None for all.
    """

    sites: tuple[SiteName, ...] | None = None
    layers: tuple[int, ...] | None = None

    produces = Prefix

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sites is not None and (not self.sites or len(set(self.sites)) < len(self.sites)):
            raise ConfigError(
                f"method.sites is {list(self.sites)}; list one or more of {', '.join(SITES)}, each "
                "once, or use null for all sites of the backbone"
            )
        check_layers(self.layers)

    def shapes(self, geometry: Geometry) -> dict[SiteName, SiteShape]:
        """The shapes of the chosen sites of a backbone, with the number of chosen layers.

        Raises:
            ConfigError: the backbone lacks a chosen site or layer.
        """
        shapes: dict[SiteName, SiteShape] = {}
        for name in geometry.sites if self.sites is None else self.sites:
            if name not in geometry.sites:
                raise ConfigError(
                    f"method.sites names {name!r}; this backbone has {', '.join(geometry.sites)}"
                )
            shape = geometry.sites[name]
            check_layers(self.layers, shape.layers, f"at the site {name!r} ")
            count = shape.layers if self.layers is None else len(self.layers)
            shapes[name] = dataclasses.replace(shape, layers=count)
        return shapes

    def chosen(self, site: Site) -> Site:
        """Selects the chosen layers of a site that has all layers, or exactly these."""
        return Site(
            inside=pick_layers(site.inside, site.layers, self.layers),
            outside=pick_layers(site.outside, site.layers, self.layers),
            layers=self.layers,
        )


def check_layers(layers: Layers, count: int | None = None, where: str = "") -> None:
    """Checks a choice of layers and, if `count` is given, that the backbone has them.

    Raises:
        ConfigError: the choice is empty or not ascending, or the backbone lacks a layer.
    """
    if layers is None:
        return
    if not layers or layers[0] < 0 or list(layers) != sorted(set(layers)):
        raise ConfigError(
            f"method.layers is {list(layers)}; list layers counted from 0 in ascending order, or "
            "use null for all"
        )
    if count is not None and layers[-1] >= count:
        raise ConfigError(
            f"method.layers names layer {layers[-1]}; {where}this backbone has 0 to {count - 1}"
        )


def pick_layers(arrays: Any, present: Layers, chosen: Layers) -> Any:
    """Selects the layers `chosen` of arrays whose leading axis is the layers `present`."""
    if present == chosen or chosen is None:
        return arrays
    index = jnp.array(chosen)

    def pick(leaf: jax.Array) -> jax.Array:
        return leaf[index]

    return jax.tree.map(pick, arrays)
