"""Warm starts: a prefix as the arrays that are copied into a row of the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import numpy as np

from prefix_jax.lift import check_sites
from prefix_jax.nn.attention.dense import MASKED
from prefix_jax.prefix import (
    Adapter,
    Embeds,
    Gated,
    Geometry,
    Hidden,
    Memory,
    Prefix,
    Produced,
)


@flax.struct.dataclass
class Warm:
    """The arrays of a prefix at a decoder, with their slots padded to a power of two.

    Padding may contain anything: the text overwrites it before anything attends to it. Layers that
    the prefix does not cover have a bias that masks its slots, and gates and matrices of zero.

    Attributes:
        k_LKPH, v_LKPH, bias_LNP: slots inside the softmax, with heads before slots as in the cache;
            None if there are none.
        gated_k_LPKH, gated_v_LPKH, gate_LN: gated slots; None if there are none.
        gated_slots: int32 scalar, the number of gated slots without padding.
        m_LNHH: matrices; None if there are none.
    """

    k_LKPH: Any = None
    v_LKPH: Any = None
    bias_LNP: Any = None
    gated_k_LPKH: Any = None
    gated_v_LPKH: Any = None
    gate_LN: Any = None
    gated_slots: Any = dataclasses.field(default_factory=lambda: np.int32(0))
    m_LNHH: Any = None

    @property
    def bytes(self) -> int:
        """The size of all arrays."""
        return sum(x.nbytes for x in jax.tree.leaves(self))


@dataclasses.dataclass(frozen=True)
class Slots:
    """Where the slots of a prefix are in a row.

    Attributes:
        count: P, the number of slots inside the softmax.
        text_position: the position of the first token of text.
        pinned: whether the slots ignore sliding windows.
    """

    count: int = 0
    text_position: int = 0
    pinned: bool = False


def bucket(size: int, smallest: int = 1) -> int:
    """Rounds a size up to a power of two, for which programs are compiled."""
    return max(smallest, 1 << (size - 1).bit_length()) if size > 0 else 0


def warm_start(
    produced: Produced,
    geometry: Geometry,
    lift: Callable[[Produced], Prefix],
    dtype: Any,
    most: int,
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

    Raises:
        PrefixError: the model has no such site or layer.
    """
    count = None
    if isinstance(produced, Prefix):
        prefix = produced
    else:
        padded, count = _padded(produced, geometry, most)
        prefix = jax.device_get(lift(padded))
    check_sites(prefix, geometry)
    site, shape = prefix.decoder, geometry.sites["decoder"]
    if site is None:
        return Warm(), Slots()

    def scatter(x: Any, fill: float = 0.0) -> np.ndarray:
        """Extends an array of some layers to all layers."""
        x = np.asarray(x)
        if site.layers is None:
            return x
        whole = np.full((shape.layers, *x.shape[1:]), fill, x.dtype)
        whole[list(site.layers)] = x
        return whole

    warm, slots = Warm(gated_slots=np.int32(0)), Slots()
    if site.length:
        assert site.inside is not None
        P = site.length if count is None else count
        text_position = prefix.text_position if count is None else count
        slots = Slots(P, text_position, prefix.pinned)
        bias_LPN: Any = site.inside.bias_LPN
        if bias_LPN is None:
            layers = shape.layers if site.layers is None else len(site.layers)
            bias_LPN = np.zeros((layers, site.length, shape.query_heads), np.float32)
        bias_LPN = np.maximum(scatter(bias_LPN, MASKED), MASKED)
        k_LPKH, v_LPKH = (scatter(x) for x in (site.inside.k_LPKH, site.inside.v_LPKH))
        warm = dataclasses.replace(
            warm,
            k_LKPH=_fit(k_LPKH, P, dtype).swapaxes(1, 2).copy(),
            v_LKPH=_fit(v_LPKH, P, dtype).swapaxes(1, 2).copy(),
            bias_LNP=_fit(bias_LPN, P, dtype).swapaxes(1, 2).copy(),
        )
    if isinstance(site.outside, Gated):
        P = site.outside.length if count is None else count
        warm = dataclasses.replace(
            warm,
            gated_k_LPKH=_fit(scatter(site.outside.k_LPKH), P, dtype),
            gated_v_LPKH=_fit(scatter(site.outside.v_LPKH), P, dtype),
            gate_LN=scatter(site.outside.gate_LN).astype(np.float32),
            gated_slots=np.int32(P),
        )
    if isinstance(site.outside, Memory):
        warm = dataclasses.replace(warm, m_LNHH=scatter(site.outside.m_LNHH).astype(dtype))
    return warm, slots


def _fit(x: np.ndarray, count: int, dtype: Any) -> np.ndarray:
    """Keeps `count` slots (axis 1) and pads them with zeros to a power of two."""
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, bucket(count) - count)
    return np.pad(x[:, :count], pad).astype(dtype)


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
