"""Cartridges: a trained KV cache, initialised from a corpus (Eyuboglu et al. 2025)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from prefix_jax.errors import ConfigError
from prefix_jax.methods.base import Method, Params
from prefix_jax.prefix import Geometry, KVPrefix, Prefix, Site, SiteName
from prefix_jax.validation import Count


@dataclasses.dataclass(frozen=True)
class Cartridge(Method[Prefix]):
    """Trains keys and values, except for the first few slots, which are frozen.

    The paper starts from the KV cache of the first P tokens of a corpus (`init.text_file`) and
    freezes the first token: models use it as an attention sink, and training is unstable if it
    moves. PEFT's `CartridgeConfig` does the same. The paper trains on self-study data, synthetic
    conversations about the corpus, which this package does not generate.

    Attributes:
        frozen: the number of leading slots that are frozen.
        pinned: keeps the prefix visible after a sliding window has moved past it.
    """

    frozen: Count = 1
    pinned: bool = False

    produces = Prefix

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frozen >= self.length:
            raise ConfigError(
                f"method.frozen is {self.frozen} of {self.length} slots; leave at least one slot "
                "trainable"
            )

    def init(self, rng: jax.Array, geometry: Geometry, start: Prefix | None) -> Params:
        shape = geometry.main
        inside = None if start is None else start.sites[geometry.main_site].inside
        if inside is None:
            size = (2, shape.layers, self.length, shape.kv_heads, shape.head_dim)
            inside = KVPrefix(*jax.random.normal(rng, size))
        F = self.frozen
        pair = {"k_LPKH": inside.k_LPKH, "v_LPKH": inside.v_LPKH}
        params: dict[str, Params] = {
            "trained": {name: x_LPKH[:, F:] for name, x_LPKH in pair.items()}
        }
        if F:
            # Parameters under this name are frozen: see `train.partition.labels`.
            params["frozen"] = {name: x_LPKH[:, :F] for name, x_LPKH in pair.items()}
        return {geometry.main_site: params}

    def __call__(self, params: Params, rng: jax.Array | None = None) -> Prefix:
        ((name, parts),) = params.items()
        site: SiteName = "encoder" if name == "encoder" else "decoder"
        k_LPKH, v_LPKH = parts["trained"]["k_LPKH"], parts["trained"]["v_LPKH"]
        if rng is not None:
            k_rng, v_rng = jax.random.split(rng)
            k_LPKH, v_LPKH = self.drop(k_LPKH, k_rng), self.drop(v_LPKH, v_rng)
        if "frozen" in parts:
            k_LPKH = jnp.concatenate([parts["frozen"]["k_LPKH"], k_LPKH], axis=1)
            v_LPKH = jnp.concatenate([parts["frozen"]["v_LPKH"], v_LPKH], axis=1)
        inside = Site(KVPrefix(k_LPKH, v_LPKH))
        return Prefix.of(
            {site: inside}, text_position=self.resolved_text_position, pinned=self.pinned
        )
