"""Prefix tuning: trainable keys and values in every layer (Li & Liang 2021)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from prefix_jax.errors import ConfigError
from prefix_jax.methods.base import Method, Params
from prefix_jax.prefix import SITES, Geometry, KVPrefix, Prefix, Site, SiteName, SiteShape


@dataclasses.dataclass(frozen=True)
class PrefixTuning(Method[Prefix]):
    """Trains the keys and values themselves, or the MLP of the paper that computes them.

    Without `mid` this is also P-tuning v2's prefix and PEFT's `PrefixTuningConfig`. With it, the
    parameters are an embedding of each slot and an MLP: Embedding(P, D) → Linear(mid) → tanh →
    Linear(L · 2 · K · H), for every site its own. What is stored after training is the MLP's
    output alone.

    Attributes:
        mid: the width of the MLP (512 or 800 in the paper); None trains keys and values.
        offset: the position of the first token of text; None for P, as in PEFT. 0 leaves positions
            unshifted, as the paper's code for BART does.
        pinned: keeps the prefix visible when a sliding window has moved past it.
        sites: which attentions get a prefix: "encoder", "decoder", "cross"; None for all that the
            backbone has.
        layers: which layers get one, counted from 0; None for all.
    """

    mid: int | None = None
    offset: int | None = None
    pinned: bool = False
    sites: tuple[SiteName, ...] | None = None
    layers: tuple[int, ...] | None = None

    produces = Prefix

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mid is not None and self.mid < 1:
            raise ConfigError(f"method.mid is {self.mid}; the MLP needs at least 1 unit")
        if self.text_start < 0:
            raise ConfigError(f"method.offset is {self.offset}; positions start at 0")
        if self.sites is not None and (not self.sites or len(set(self.sites)) < len(self.sites)):
            raise ConfigError(
                f"method.sites is {list(self.sites)}; name one or more of {', '.join(SITES)}, each "
                "once, or give null for all that the backbone has"
            )
        if self.layers is not None and (
            not self.layers or self.layers[0] < 0 or list(self.layers) != sorted(set(self.layers))
        ):
            raise ConfigError(
                f"method.layers is {list(self.layers)}; give layers counted from 0 in ascending "
                "order, or null for all"
            )

    @property
    def text_start(self) -> int:
        return self.length if self.offset is None else self.offset

    def init(self, rng: jax.Array, geometry: Geometry, start: Prefix | None) -> Params:
        """See `Method.init`.

        Raises:
            ConfigError: the backbone has no such site, or no such layer.
        """
        names = tuple(geometry.sites) if self.sites is None else self.sites
        params: dict[str, Params] = {}
        for name, site_rng in zip(names, jax.random.split(rng, len(names)), strict=True):
            if name not in geometry.sites:
                raise ConfigError(
                    f"method.sites names {name!r}; this backbone has {', '.join(geometry.sites)}"
                )
            shape = geometry.sites[name]
            if self.layers is not None and self.layers[-1] >= shape.layers:
                raise ConfigError(
                    f"method.layers names layer {self.layers[-1]}; at the site {name!r} this "
                    f"backbone has 0 to {shape.layers - 1}"
                )
            join = None
            if start is not None:
                join = start.sites[name].join
                if self.layers is not None:
                    index = jnp.array(self.layers)
                    join = jax.tree.map(lambda leaf: leaf[index], join)  # noqa: B023
            params[name] = self._init_site(site_rng, geometry.d_model, shape, join)
        return params

    def _init_site(
        self, rng: jax.Array, d_model: int, shape: SiteShape, start: KVPrefix | None
    ) -> Params:
        P, D, X = self.length, d_model, self.mid
        L = shape.layers if self.layers is None else len(self.layers)
        K, H = shape.kv_heads, shape.head_dim
        if X is None:
            if start is None:
                k_LPKH, v_LPKH = jax.random.normal(rng, (2, L, P, K, H))
            else:
                k_LPKH, v_LPKH = start.k_LPKH, start.v_LPKH
            return {"k_LPKH": k_LPKH, "v_LPKH": v_LPKH}

        # X is the width of the MLP, 2 stands for key and value.
        keys = jax.random.split(rng, 5)
        params = {
            "embedding_PD": jax.random.normal(keys[0], (P, D)),
            "in_DX": torch_linear(keys[1], (D, X), fan_in=D),
            "in_bias_X": torch_linear(keys[2], (X,), fan_in=D),
            "out_XL2KH": torch_linear(keys[3], (X, L, 2, K, H), fan_in=X),
            "out_bias_L2KH": torch_linear(keys[4], (L, 2, K, H), fan_in=X),
        }
        if start is not None:
            # In low-data runs the paper fits the MLP to real activations by gradient descent. Its
            # last layer alone can meet them exactly (if P <= X): linear equations, P of them.
            target_PL2KH = jnp.stack([start.k_LPKH, start.v_LPKH], axis=1).transpose(2, 0, 1, 3, 4)
            missing_PY = (target_PL2KH - _mlp(params)).reshape(P, -1)
            solution_XY = jnp.linalg.lstsq(_features(params), missing_PY)[0]
            params["out_XL2KH"] += solution_XY.reshape(params["out_XL2KH"].shape)
        return params

    def __call__(self, params: Params, rng: jax.Array | None = None) -> Prefix:
        sites: dict[SiteName, Site] = {}
        for number, name in enumerate(name for name in SITES if name in params):
            site = params[name]
            if self.mid is None:
                k_LPKH, v_LPKH = site["k_LPKH"], site["v_LPKH"]
            else:
                k_LPKH, v_LPKH = jnp.einsum("PLCKH->CLPKH", _mlp(site))
            if rng is not None:
                k_rng, v_rng = jax.random.split(jax.random.fold_in(rng, number))
                k_LPKH, v_LPKH = self.drop(k_LPKH, k_rng), self.drop(v_LPKH, v_rng)
            sites[name] = Site(KVPrefix(k_LPKH, v_LPKH), layers=self.layers)
        return Prefix.of(sites, offset=self.text_start, pinned=self.pinned)


def _features(params: Params) -> jax.Array:
    features_PX: jax.Array = jnp.tanh(
        params["embedding_PD"] @ params["in_DX"] + params["in_bias_X"]
    )
    return features_PX


def _mlp(params: Params) -> jax.Array:
    out_PL2KH = jnp.tensordot(_features(params), params["out_XL2KH"], axes=1)
    return out_PL2KH + params["out_bias_L2KH"]


def torch_linear(rng: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """The default of `torch.nn.Linear`, which the original code leaves in place."""
    bound = fan_in**-0.5
    return jax.random.uniform(rng, shape, minval=-bound, maxval=bound)
