"""Warm starts: a prefix as the arrays that rows of the cache start with.

Short prefixes are copied into a row. Long ones stay as they are, and all rows that use one read the
same arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax.decode.sizes import bucket
from prefix_jax.lift import check_sites
from prefix_jax.nn.attention.dense import MASKED
from prefix_jax.prefix import (
    Adapter,
    Embeds,
    Gated,
    Geometry,
    Hidden,
    Memory,
    OutsideRows,
    Prefix,
    Produced,
    SharedSlots,
    Site,
    SiteName,
    SiteShape,
)


@flax.struct.dataclass
class WarmSite:
    """The arrays of a prefix at one attention, with their slots padded to a power of two.

    Layers that the prefix does not cover have a bias that masks its slots, and gates and matrices
    of zero. Padding has a bias of zero at the decoder, where the text overwrites it before anything
    attends to it, and a bias that masks it elsewhere.

    Attributes:
        k_LKPH, v_LKPH, bias_LNP: slots inside the softmax, with heads before slots as in the cache;
            None without them.
        gated_k_LPKH, gated_v_LPKH, gate_LN: gated slots; None without them.
        gated_slots_L: the number of gated slots without padding, in every layer.
        m_LNHH: matrices; None without them.
    """

    k_LKPH: Any = None
    v_LKPH: Any = None
    bias_LNP: Any = None
    gated_k_LPKH: Any = None
    gated_v_LPKH: Any = None
    gate_LN: Any = None
    gated_slots_L: Any = None
    m_LNHH: Any = None

    def layer(self, index: int) -> WarmSite:
        """The arrays of one layer, without the axis L."""
        layer: WarmSite = jax.tree.map(lambda x: x[index], self)
        return layer

    def outside_row(self) -> OutsideRows:
        """The terms of one layer outside the softmax, as those of a batch of one row."""
        gated = memory = None
        slots_B = jnp.zeros(1, jnp.int32)
        if self.gated_k_LPKH is not None:
            gated = Gated(self.gated_k_LPKH[None], self.gated_v_LPKH[None], self.gate_LN[None])
            slots_B = self.gated_slots_L[None]
        if self.m_LNHH is not None:
            memory = Memory(self.m_LNHH[None])
        return OutsideRows(gated, slots_B, memory)


@flax.struct.dataclass
class Warm:
    """The arrays of a prefix.

    Attributes:
        decoder, encoder, cross: its sites, as they are copied into a row; None if there is nothing
            to copy.
        shared: the slots of the decoder in every layer, which rows read in place; None for a prefix
            that is copied.
        embeds_PD: soft tokens before the input of an encoder, padded; None without them.
        soft_tokens: int32 scalar, the number of soft tokens without padding.
        encoder_position: int32 scalar, the position of the encoder's first token, soft tokens
            included.
        ngrams_G2W: the n-gram table that drafts are looked up in; None without one.
    """

    decoder: WarmSite | None = None
    encoder: WarmSite | None = None
    cross: WarmSite | None = None
    shared: tuple[SharedSlots, ...] | None = None
    embeds_PD: Any = None
    soft_tokens: Any = 0
    encoder_position: Any = 0
    ngrams_G2W: Any = None

    @property
    def shared_size(self) -> int:
        """The number of shared slots, padding included."""
        return 0 if self.shared is None else self.shared[0].k_KPH.shape[1]

    @property
    def bytes(self) -> int:
        """The size of all arrays."""
        return sum(np.asarray(x).nbytes for x in jax.tree.leaves(self))


@dataclasses.dataclass(frozen=True)
class Slots:
    """The slots of a prefix in a row, and the positions after them.

    Attributes:
        count: P, the number of slots inside the softmax of the decoder.
        text_position: the position of the decoder's first token of text.
        pinned: whether the slots ignore sliding windows.
        input_position: the position of the first token of the prompt in the stack that reads it.
        shared: whether rows share the slots; otherwise they are the first columns of a row.
    """

    count: int = 0
    text_position: int = 0
    pinned: bool = False
    input_position: int = 0
    shared: bool = False

    @property
    def columns(self) -> int:
        """The number of columns of the row that the slots occupy."""
        return 0 if self.shared else self.count


def warm_start(
    produced: Produced,
    geometry: Geometry,
    lift: Callable[[Produced], Prefix],
    dtype: Any,
    most: int,
    share_slots: int | None,
) -> tuple[Warm, Slots]:
    """Converts a prefix to a warm start, on the host.

    `lift` compiles a program per shape. Soft tokens, hidden states and adapters are therefore
    padded before they are lifted (no slot depends on a later one), so that adding a prefix of
    another length rarely compiles.

    Args:
        produced: the prefix in its method's form.
        geometry: the shapes of the backbone.
        lift: `Backbone.lift` with the weights, compiled.
        dtype: the dtype of the cache.
        most: the maximum number of slots that can be lifted.
        share_slots: prefixes with more slots are shared, except with an encoder; None shares none.

    Raises:
        PrefixError: the model has no such site or layer.
    """
    count = None
    if isinstance(produced, Prefix):
        prefix = produced
    elif isinstance(produced, Embeds) and geometry.encoder is not None:
        prefix = Prefix(embeds_PD=produced.x_PD)
    else:
        padded, count = _padded(produced, geometry, most)
        lifted: Prefix = jax.device_get(lift(padded))
        # A lifted prefix begins at position 0, and its text follows.
        prefix = dataclasses.replace(lifted, text_position=count)
    check_sites(prefix, geometry)
    sites: dict[SiteName, WarmSite] = {
        name: _warm_site(site, geometry.sites[name], count, dtype, name)
        for name, site in prefix.sites.items()
    }
    soft = prefix.soft_tokens
    embeds_PD = prefix.embeds_PD
    warm = Warm(
        decoder=sites.get("decoder"),
        encoder=sites.get("encoder"),
        cross=sites.get("cross"),
        embeds_PD=None if embeds_PD is None else _fit(np.asarray(embeds_PD), soft, dtype, axis=0),
        soft_tokens=np.int32(soft),
        encoder_position=np.int32(prefix.text_position_in("encoder")),
    )
    decoder = prefix.decoder
    slots = 0 if decoder is None else decoder.length
    if count is not None and slots:
        slots = count
    shared = share_slots is not None and slots > share_slots and geometry.encoder is None
    if shared:
        warm = _share(warm)
    text_position = prefix.text_position_in("decoder")
    return warm, Slots(
        count=slots,
        text_position=text_position,
        pinned=prefix.pinned,
        shared=shared,
        input_position=(
            text_position if geometry.encoder is None else prefix.text_position_in("encoder") + soft
        ),
    )


def _share(warm: Warm) -> Warm:
    """Moves the slots of the decoder to `Warm.shared`, one set of arrays per layer: a program that
    received all layers in one array would copy each out of it."""
    site = warm.decoder
    assert site is not None
    shared = tuple(
        SharedSlots(k_KPH.copy(), v_KPH.copy(), bias_NP.copy())
        for k_KPH, v_KPH, bias_NP in zip(site.k_LKPH, site.v_LKPH, site.bias_LNP, strict=True)
    )
    rest = dataclasses.replace(site, k_LKPH=None, v_LKPH=None, bias_LNP=None)
    return dataclasses.replace(warm, decoder=rest if jax.tree.leaves(rest) else None, shared=shared)


def _warm_site(
    site: Site, shape: SiteShape, count: int | None, dtype: Any, name: SiteName
) -> WarmSite:
    """Pads the slots of a site and extends it to all layers.

    Args:
        site: the site.
        shape: its shape.
        count: the number of its slots without padding; None if it has no padding.
        dtype: the dtype of the cache.
        name: the name of the site.
    """

    def scatter(x: Any, fill: float = 0.0) -> np.ndarray:
        x = np.asarray(x)
        if site.layers is None:
            return x
        whole = np.full((shape.layers, *x.shape[1:]), fill, x.dtype)
        whole[list(site.layers)] = x
        return whole

    warm = WarmSite()
    if site.inside is not None and site.length:
        P = site.length if count is None else count
        bias_LPN: Any = site.inside.bias_LPN
        if bias_LPN is None:
            layers = shape.layers if site.layers is None else len(site.layers)
            bias_LPN = np.zeros((layers, site.length, shape.query_heads), np.float32)
        bias_LPN = np.maximum(scatter(bias_LPN, MASKED), MASKED)
        k_LPKH, v_LPKH = (scatter(x) for x in (site.inside.k_LPKH, site.inside.v_LPKH))
        fill = 0.0 if name == "decoder" else MASKED
        warm = dataclasses.replace(
            warm,
            k_LKPH=_fit(k_LPKH, P, dtype).swapaxes(1, 2).copy(),
            v_LKPH=_fit(v_LPKH, P, dtype).swapaxes(1, 2).copy(),
            bias_LNP=_fit(bias_LPN, P, dtype, fill).swapaxes(1, 2).copy(),
        )
    if isinstance(site.outside, Gated):
        P = site.outside.length if count is None else count
        warm = dataclasses.replace(
            warm,
            gated_k_LPKH=_fit(scatter(site.outside.k_LPKH), P, dtype),
            gated_v_LPKH=_fit(scatter(site.outside.v_LPKH), P, dtype),
            gate_LN=scatter(site.outside.gate_LN).astype(np.float32),
            gated_slots_L=np.full(shape.layers, P, np.int32),
        )
    if isinstance(site.outside, Memory):
        warm = dataclasses.replace(warm, m_LNHH=scatter(site.outside.m_LNHH).astype(dtype))
    return warm


def _fit(x: np.ndarray, count: int, dtype: Any, fill: float = 0.0, axis: int = 1) -> np.ndarray:
    """Keeps `count` slots and pads them to a power of two."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, bucket(count) - count)
    kept = x[(slice(None),) * axis + (slice(count),)]
    return np.pad(kept, pad, constant_values=fill).astype(dtype)


def _padded(
    produced: Embeds | Hidden | Adapter, geometry: Geometry, most: int
) -> tuple[Embeds | Hidden | Adapter, int]:
    """Pads the slots of a prefix before it is lifted. Returns the number without padding."""

    def pad(x: Any, axis: int) -> Any:
        x = np.asarray(x)
        size = min(bucket(x.shape[axis]), max(most, x.shape[axis]))
        return np.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])

    if isinstance(produced, Embeds):
        return Embeds(pad(produced.x_PD, 0)), len(produced.x_PD)
    count = produced.h_LPD.shape[1]
    if isinstance(produced, Hidden):
        return Hidden(pad(produced.h_LPD, 1)), count
    # All layers, so that a choice of layers is no other program; their gates are zero.
    shape = geometry.main
    h_LPD: Any = pad(produced.h_LPD, 1)
    gate_LN: Any = np.asarray(produced.gate_LN)
    gate_LN = np.broadcast_to(gate_LN, (len(gate_LN), shape.query_heads))
    if produced.layers is not None:
        layers = list(produced.layers)
        whole_LPD = np.zeros((shape.layers, *h_LPD.shape[1:]), h_LPD.dtype)
        whole_LN = np.zeros((shape.layers, shape.query_heads), gate_LN.dtype)
        whole_LPD[layers], whole_LN[layers] = h_LPD, gate_LN
        h_LPD, gate_LN = whole_LPD, whole_LN
    return Adapter(h_LPD, gate_LN), count
