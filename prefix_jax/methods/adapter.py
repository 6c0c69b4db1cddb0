"""LLaMA-Adapter: states that the top layers attend to through a gate (Zhang et al. 2023)."""

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

    The layer's own projections make keys and values of the states, without norm and rotation; they
    have a softmax of their own, whose result is added through the gate. Gates begin at zero, so
    that training starts from the bare model, exactly.

    Attributes:
        layers: how many of the topmost layers (30 of LLaMA-7B's 32 in the paper), or which, counted
            from 0; None for all.
        gate: "tanh" trains one number for each query head, which passes through tanh, as in the
            paper's code; "plain" one for each layer, taken as it is, as PEFT does.
    """

    layers: int | tuple[int, ...] | None = None
    gate: Literal["tanh", "plain"] = "tanh"

    produces = Adapter
    default_start = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layers, int):
            if self.layers < 1:
                raise ConfigError(f"method.layers is {self.layers}; adapt at least 1 layer")
        else:
            check_layers(self.layers)

    @property
    def text_start(self) -> int:
        return 0

    def init(self, rng: jax.Array, geometry: Geometry, start: Adapter | None) -> Params:
        """See `Method.init`.

        Raises:
            ConfigError: the backbone has no such layer.
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
        # An `Adapter` again, which knows its layers; only its gate is not yet what is produced.
        return {"adapter": Adapter(h_LPD, gate_LN, layers)}

    def _chosen(self, count: int) -> Layers:
        if not isinstance(self.layers, int):
            check_layers(self.layers, count)
            return self.layers
        if self.layers > count:
            raise ConfigError(
                f"method.layers adapts the top {self.layers} layers; this backbone has {count}"
            )
        return None if self.layers == count else tuple(range(count - self.layers, count))

    def _trained_gate(self, gate_LN: jax.Array) -> jax.Array:
        """The parameter of which a start's gate is made."""
        if self.gate == "plain":
            return gate_LN[:, :1]
        # In float32 tanh reaches 1, of which there is no way back.
        largest = np.nextafter(np.float32(1), np.float32(0))
        return jnp.arctanh(jnp.clip(gate_LN, -largest, largest))

    def __call__(self, params: Params, rng: jax.Array | None = None) -> Adapter:
        adapter: Adapter = params["adapter"]
        gate_LN = jnp.tanh(adapter.gate_LN) if self.gate == "tanh" else adapter.gate_LN
        return Adapter(self.drop(adapter.h_LPD, rng), gate_LN, adapter.layers)
