"""Converts prefixes to named arrays (`decoder.k_LPKH`, `encoder.gated.gate_LN`) and back."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from prefix_jax.errors import PrefixError
from prefix_jax.prefix import (
    SITES,
    Adapter,
    Embeds,
    Gated,
    Geometry,
    Hidden,
    KVPrefix,
    Layers,
    Memory,
    Prefix,
    Produced,
    Site,
    SiteName,
    SiteShape,
)
from prefix_jax.validation import Count, check_fields

Kind = Literal["embeds", "hidden", "adapter", "kv"]
Shape = tuple[int, ...]

_OUTSIDE: dict[str, type[Gated] | type[Memory]] = {"gated": Gated, "memory": Memory}
# Arrays that a site may omit end in this name.
_OPTIONAL = "bias_LPN"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixSpec:
    """The description of a prefix that its arrays do not contain.

    Attributes:
        kind: "embeds", "hidden", "adapter" or "kv", for `Embeds`, `Hidden`, `Adapter`, `Prefix`.
        length: P; 0 for methods without slots (Prefix-Tuning+).
        text_position: the position of the first text token.
        pinned: whether the prefix stays visible outside a sliding window.
        layers: the layers of each site; sites that are not listed have all layers.
    """

    kind: Kind
    length: Count
    text_position: Count
    pinned: bool
    layers: dict[str, tuple[Count, ...]]

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of a stored array. The dtype is a string if NumPy has no such dtype."""

    shape: Shape
    dtype: np.dtype | str


def prefix_spec(produced: Produced) -> PrefixSpec:
    """Returns the spec of a prefix.

    Raises:
        PrefixError: the prefix has no slots, or is a bank.
    """
    if isinstance(produced, Embeds | Prefix) and produced.bank_size is not None:
        raise PrefixError(
            f"cannot store a bank of {produced.bank_size} prefixes; store each of them separately "
            "(split_bank)"
        )
    if isinstance(produced, Embeds):
        P = produced.x_PD.shape[0]
        return PrefixSpec(kind="embeds", length=P, text_position=P, pinned=False, layers={})
    if isinstance(produced, Hidden):
        P = produced.h_LPD.shape[1]
        return PrefixSpec(kind="hidden", length=P, text_position=P, pinned=False, layers={})
    if isinstance(produced, Adapter):
        layers = {} if produced.layers is None else {"adapter": produced.layers}
        P = produced.h_LPD.shape[1]
        return PrefixSpec(kind="adapter", length=P, text_position=0, pinned=False, layers=layers)
    if not any(leaf.size for leaf in jax.tree.leaves(produced)):
        raise PrefixError("cannot store a prefix that has no slots")
    return PrefixSpec(
        kind="kv",
        length=produced.length,
        text_position=produced.text_position,
        pinned=produced.pinned,
        layers={n: site.layers for n, site in produced.sites.items() if site.layers is not None},
    )


def to_arrays(produced: Produced) -> dict[str, np.ndarray]:
    """Returns the arrays by name, in float32."""
    if not isinstance(produced, Prefix):
        return _fields("", produced)
    arrays = {}
    if produced.embeds_PD is not None:
        arrays["embeds_PD"] = np.array(produced.embeds_PD, np.float32, order="C")
    for name, site in produced.sites.items():
        arrays |= _fields(f"{name}.", site.inside)
        for kind, cls in _OUTSIDE.items():
            if isinstance(site.outside, cls):
                arrays |= _fields(f"{name}.{kind}.", site.outside)
    return arrays


def digest(produced: Produced) -> str:
    """Returns the SHA-256 of a prefix: its spec and its arrays in float32.

    An empty prefix, which stands for the bare model, has no spec, because it cannot be stored.
    """
    content = hashlib.sha256()
    if jax.tree.leaves(produced):
        content.update(repr(prefix_spec(produced)).encode())
    for name, x in sorted(to_arrays(produced).items()):
        content.update(f"{name} {x.shape}".encode())
        content.update(x.astype("<f4").tobytes())
    return content.hexdigest()


def _fields(where: str, owner: Any) -> dict[str, np.ndarray]:
    if owner is None:
        return {}
    fields = {f.name: getattr(owner, f.name) for f in dataclasses.fields(owner)}
    return {
        where + name: np.array(x, np.float32, order="C")
        for name, x in fields.items()
        if name != "layers" and x is not None
    }


def from_arrays(stored: PrefixSpec, arrays: Mapping[str, jax.Array]) -> Produced:
    """Builds the prefix of these arrays. The inverse of `to_arrays`."""
    if stored.kind == "embeds":
        return Embeds(arrays["x_PD"])
    if stored.kind == "hidden":
        return Hidden(**arrays)
    if stored.kind == "adapter":
        return Adapter(**arrays, layers=_layers(stored, "adapter"))
    sites: dict[SiteName, Site] = {}
    for name in SITES:
        of_site = _under(f"{name}.", arrays)
        inside = {key: x for key, x in of_site.items() if "." not in key}
        outside = [cls(**_under(f"{kind}.", of_site)) for kind, cls in _OUTSIDE.items()
                  if _under(f"{kind}.", of_site)]  # fmt: skip
        if of_site:
            sites[name] = Site(
                KVPrefix(**inside) if inside else None,
                outside[0] if outside else None,
                _layers(stored, name),
            )
    prefix = Prefix.of(sites, text_position=stored.text_position, pinned=stored.pinned)
    return dataclasses.replace(prefix, embeds_PD=arrays.get("embeds_PD"))


def _under(where: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(where): x for name, x in arrays.items() if name.startswith(where)}


def _layers(stored: PrefixSpec, name: str) -> Layers:
    return stored.layers.get(name)


def problems(
    arrays: Mapping[str, np.ndarray | ArraySpec], stored: PrefixSpec, geometry: Geometry
) -> list[str]:
    """Lists missing and unknown arrays, wrong shapes and dtypes, and values that are not finite.

    Args:
        arrays: the arrays, or their specs before they are read.
        stored: the spec of the prefix.
        geometry: the geometry of the backbone.
    """
    messages = []
    expected = _shapes(arrays, stored, geometry)
    for name, shape in expected.items():
        x = arrays.get(name)
        optional = name.endswith(_OPTIONAL)
        if x is None:
            if not optional:
                messages.append(f"{name} is missing")
        elif x.shape != shape or x.dtype != np.float32:
            messages.append(f"{name} is {x.dtype} {x.shape} instead of float32 {shape}")
        elif isinstance(x, np.ndarray):
            # A bias of -inf marks a slot as absent.
            broken = ~np.isfinite(x) & ~(optional & np.isneginf(x))
            if broken.any():
                messages.append(f"{name} has {broken.sum()} values that are NaN or infinite")
    return messages + [f"{name} is unknown" for name in arrays if name not in expected]


def _shapes(
    arrays: Mapping[str, np.ndarray | ArraySpec], stored: PrefixSpec, geometry: Geometry
) -> dict[str, Shape]:
    P, D, main = stored.length, geometry.d_model, geometry.main
    if stored.kind == "embeds":
        return {"x_PD": (P, geometry.input_dim)}
    if stored.kind == "hidden":
        return {"h_LPD": (main.layers, P, D)}
    if stored.kind == "adapter":
        L = len(_layers(stored, "adapter") or range(main.layers))
        # One gate per head, or one gate shared by all heads.
        shared = "gate_LN" in arrays and arrays["gate_LN"].shape[-1:] == (1,)
        return {"h_LPD": (L, P, D), "gate_LN": (L, 1 if shared else main.query_heads)}
    shapes: dict[str, Shape] = {}
    if "embeds_PD" in arrays:
        shapes["embeds_PD"] = (P, geometry.input_dim)
    for name, site in geometry.sites.items():
        L = len(_layers(stored, name) or range(site.layers))
        parts = {key.removeprefix(f"{name}.").rpartition(".")[0]
                 for key in arrays if key.startswith(f"{name}.")}  # fmt: skip
        for part in sorted(parts):
            where = f"{name}.{part}." if part else f"{name}."
            shapes |= {where + key: shape for key, shape in _part_shapes(part, L, P, site).items()}
    return shapes


def _part_shapes(part: str, L: int, P: int, site: SiteShape) -> dict[str, Shape]:
    N, K, H = site.query_heads, site.kv_heads, site.head_dim
    pair: dict[str, Shape] = {"k_LPKH": (L, P, K, H), "v_LPKH": (L, P, K, H)}
    if part == "":
        return {**pair, _OPTIONAL: (L, P, N)}
    if part == "gated":
        return {**pair, "gate_LN": (L, N)}
    return {"m_LNHH": (L, N, H, H)} if part == "memory" else {}
