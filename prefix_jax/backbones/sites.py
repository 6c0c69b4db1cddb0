"""Keys and values of a model's layers as the sites of a prefix, and sites at all of its layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from prefix_jax.errors import PrefixError
from prefix_jax.nn.layers import KeysValues
from prefix_jax.prefix import KVPrefix, Prefix, Site, SiteName, SiteShape


def site_of(layers: KeysValues) -> Site:
    """The keys and values of rows, [L, B, K, P, H], as a site."""
    return Site(KVPrefix(*slots_of(layers)))


def slots_of(layers: KeysValues) -> tuple[jax.Array, jax.Array]:
    """k_LPKH and v_LPKH of rows, [L, B, K, P, H], one row after another."""

    def joined(x_LBKPH: jax.Array) -> jax.Array:
        L, B, K, P, H = x_LBKPH.shape
        return x_LBKPH.swapaxes(2, 3).reshape(L, B * P, K, H)

    return joined(layers.k_BKSH), joined(layers.v_BKSH)


def complete(prefix: Prefix, shapes: Mapping[SiteName, SiteShape]) -> Prefix:
    """The prefix with every site at all layers of a model whose attentions have these shapes.

    Raises:
        PrefixError: the model has no such site, or no such layer.
    """
    sites: dict[SiteName, Site] = {}
    for name, site in prefix.sites.items():
        if name not in shapes:
            raise PrefixError(
                f"the prefix has a site {name!r}; this model's are {', '.join(shapes)}"
            )
        sites[name] = _all_layers(site, shapes[name])
    if all(sites[name] is site for name, site in prefix.sites.items()):
        return prefix
    whole = Prefix.of(sites, text_position=prefix.text_position, pinned=prefix.pinned)
    return dataclasses.replace(whole, embeds_PD=prefix.embeds_PD, tasks=prefix.tasks)


def _all_layers(site: Site, shape: SiteShape) -> Site:
    """The site at all layers: absent slots, and gates and matrices of zero, where it had none.

    Raises:
        PrefixError: the model has no such layer.
    """
    if site.layers is None:
        return site
    if max(site.layers) >= shape.layers:
        raise PrefixError(
            f"the prefix is of layer {max(site.layers)}; this model's are 0 to {shape.layers - 1}"
        )
    index, inside = jnp.array(site.layers), site.inside

    def scatter(leaf: jax.Array, rest: float = 0.0) -> jax.Array:
        return jnp.full((shape.layers, *leaf.shape[1:]), rest, leaf.dtype).at[index].set(leaf)

    if inside is not None:
        bias_LPN = inside.bias_LPN
        if bias_LPN is None:
            bias_LPN = jnp.zeros((len(site.layers), inside.length, shape.query_heads))
        inside = KVPrefix(
            scatter(inside.k_LPKH), scatter(inside.v_LPKH), scatter(bias_LPN, -jnp.inf)
        )
    return Site(inside, jax.tree.map(scatter, site.outside))
