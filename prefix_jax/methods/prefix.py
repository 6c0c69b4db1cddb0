"""Prefix tuning: trainable keys and values in every layer (Li & Liang 2021)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from prefix_jax.errors import ConfigError
from prefix_jax.methods.base import Method, Params, normal
from prefix_jax.prefix import Geometry, KVPrefix, Prefix, Site


@dataclasses.dataclass(frozen=True)
class PrefixTuning(Method[Prefix]):
    """Trains the keys and values themselves, or the MLP of the paper that computes them.

    Without `mid` this is also P-tuning v2's prefix and PEFT's `PrefixTuningConfig`. With it, the
    parameters are an embedding of each slot and an MLP: Embedding(P, D) → Linear(mid) → tanh →
    Linear(L · 2 · K · H). What is stored after training is the MLP's output alone.

    Attributes:
        mid: the width of the MLP (512 or 800 in the paper); None trains keys and values.
        offset: the position of the first token of text; None for P, as in PEFT.
        pinned: keeps the prefix visible when a sliding window has moved past it.
    """

    mid: int | None = None
    offset: int | None = None
    pinned: bool = False

    produces = Prefix

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mid is not None and self.mid < 1:
            raise ConfigError(f"method.mid is {self.mid}; the MLP needs at least 1 unit")
        if self.text_start < 0:
            raise ConfigError(f"method.offset is {self.offset}; positions start at 0")

    @property
    def text_start(self) -> int:
        return self.length if self.offset is None else self.offset

    def init(self, rng: jax.Array, geometry: Geometry, start: Prefix | None) -> Params:
        if self.mid is None:
            start = start or normal(Prefix, geometry, self.length, rng, std=1.0)
            join = start.decoder.join
            return {"k_LPKH": join.k_LPKH, "v_LPKH": join.v_LPKH}

        # X is the width of the MLP, 2 stands for key and value.
        g, D, X = geometry, geometry.d_model, self.mid
        keys = jax.random.split(rng, 5)
        params = {
            "embedding_PD": jax.random.normal(keys[0], (self.length, D)),
            "in_DX": _torch_linear(keys[1], (D, X), fan_in=D),
            "in_bias_X": _torch_linear(keys[2], (X,), fan_in=D),
            "out_XL2KH": _torch_linear(keys[3], (X, g.layers, 2, g.kv_heads, g.head_dim), fan_in=X),
            "out_bias_L2KH": _torch_linear(
                keys[4], (g.layers, 2, g.kv_heads, g.head_dim), fan_in=X
            ),
        }
        if start is not None:
            # In low-data runs the paper fits the MLP to real activations by gradient descent. Its
            # last layer alone can meet them exactly (if P <= X): linear equations, P of them.
            join = start.decoder.join
            target_PL2KH = jnp.stack([join.k_LPKH, join.v_LPKH], axis=1).transpose(2, 0, 1, 3, 4)
            missing_PY = (target_PL2KH - self._mlp(params)).reshape(self.length, -1)
            solution_XY = jnp.linalg.lstsq(self._features(params), missing_PY)[0]
            params["out_XL2KH"] += solution_XY.reshape(params["out_XL2KH"].shape)
        return params

    def __call__(self, params: Params, rng: jax.Array | None = None) -> Prefix:
        if self.mid is None:
            k_LPKH, v_LPKH = params["k_LPKH"], params["v_LPKH"]
        else:
            k_LPKH, v_LPKH = jnp.einsum("PLCKH->CLPKH", self._mlp(params))
        if rng is not None:
            k_rng, v_rng = jax.random.split(rng)
            k_LPKH, v_LPKH = self.drop(k_LPKH, k_rng), self.drop(v_LPKH, v_rng)
        return Prefix(Site(KVPrefix(k_LPKH, v_LPKH)), self.text_start, self.pinned)

    def _features(self, params: Params) -> jax.Array:
        return jnp.tanh(params["embedding_PD"] @ params["in_DX"] + params["in_bias_X"])

    def _mlp(self, params: Params) -> jax.Array:
        out_PL2KH = jnp.tensordot(self._features(params), params["out_XL2KH"], axes=1)
        return out_PL2KH + params["out_bias_L2KH"]


def _torch_linear(rng: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """The default of `torch.nn.Linear`, which the original code leaves in place."""
    bound = fan_in**-0.5
    return jax.random.uniform(rng, shape, minval=-bound, maxval=bound)
