"""LLaMA-Adapter: gated attention of the top layers to trained states (Zhang et al. 2023)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from prefix_jax.errors import ConfigError
from prefix_jax.methods.base import Method, Params
from prefix_jax.methods.sites import check_layers, pick_layers
from prefix_jax.prefix import Adapter, Geometry, Layers


@dataclasses.dataclass(frozen=True)
class LlamaAdapter(Method[Adapter]):
    """Trains P × D states and a gate in each of the top layers.

    The layer's own projections map the states to keys and values, without norm and rotation. These
    have a separate softmax, whose output is added through the gate. Gates start at zero, so
    training starts exactly from the bare model.

    Attributes:
        layers: the number of top layers (30 of LLaMA-7B's 32 in the paper), or layer indices from
            0; None for all.
        gate: "tanh" trains one number per query head and applies tanh, as in the paper's code;
            "plain" trains one number per layer and uses it directly, as in PEFT.
    """

    layers: int | tuple[int, ...] | None = None
    gate: Literal["tanh", "plain"] = "tanh"

    produces = Adapter
    default_start = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layers, int):
            if self.layers < 1:
                raise ConfigError(f"method.layers must be at least 1, got {self.layers}")
        else:
            check_layers(self.layers)

    @property
    def resolved_text_position(self) -> int:
        return 0

    def init(self, rng: jax.Array, geometry: Geometry, start: Adapter | None) -> Params:
        """Initialises the states at random and the gates at 0, or both from `start`.

        Raises:
            ConfigError: the backbone lacks a chosen layer.
        """
        shape = geometry.main
        layers = self._chosen(shape.layers)
        L = shape.layers if layers is None else len(layers)
        if start is None:
            h_LPD = jax.random.normal(rng, (L, self.length, geometry.d_model))
            gate_LN = jnp.zeros((L, shape.query_heads if self.gate == "tanh" else 1))
        else:
            h_LPD, gate_LN = pick_layers((start.h_LPD, start.gate_LN), start.layers, layers)
            gate_LN = self._trained_gate(gate_LN)
        # Stored as an `Adapter`, which records its layers; only the gate is not in final form.
        return {"adapter": Adapter(h_LPD, gate_LN, layers)}

    def _chosen(self, count: int) -> Layers:
        if not isinstance(self.layers, int):
            check_layers(self.layers, count)
            return self.layers
        if self.layers > count:
            raise ConfigError(
                f"method.layers adapts the top {self.layers} layers; this backbone has {count}, "
                "choose fewer"
            )
        return None if self.layers == count else tuple(range(count - self.layers, count))

    def _trained_gate(self, gate_LN: jax.Array) -> jax.Array:
        """Inverts the gate function, to start from a given gate."""
        if self.gate == "plain":
            return gate_LN[:, :1]
        # In float32, tanh reaches 1, where its inverse is infinite.
        largest = np.nextafter(np.float32(1), np.float32(0))
        return jnp.arctanh(jnp.clip(gate_LN, -largest, largest))

    def __call__(self, params: Params, rng: jax.Array | None = None) -> Adapter:
        adapter: Adapter = params["adapter"]
        gate_LN = jnp.tanh(adapter.gate_LN) if self.gate == "tanh" else adapter.gate_LN
        return Adapter(self.drop(adapter.h_LPD, rng), gate_LN, adapter.layers)
