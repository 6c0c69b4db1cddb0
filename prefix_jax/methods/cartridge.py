"""Cartridges: the cache of a corpus, which trains on (Eyuboglu et al. 2025)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from prefix_jax.errors import ConfigError
from prefix_jax.methods.base import Method, Params
from prefix_jax.prefix import Geometry, KVPrefix, Prefix, Site, SiteName
from prefix_jax.typed import Count


@dataclasses.dataclass(frozen=True)
class Cartridge(Method[Prefix]):
    """Trains keys and values of which the first few stay as they are.

    The paper starts from the cache that the first P tokens of a corpus leave (`init.text_file`),
    and keeps the first token frozen: models use it as an attention sink, and training is unstable
    where it moves. PEFT's `CartridgeConfig` is the same. The paper's self-study data, synthetic
    conversations about the corpus, are not made here: train on what you have.

    Attributes:
        frozen: how many of the first slots do not train.
        pinned: keeps the prefix visible when a sliding window has moved past it.
    """

    frozen: Count = 1
    pinned: bool = False

    produces = Prefix

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frozen >= self.length:
            raise ConfigError(
                f"method.frozen is {self.frozen} of {self.length} slots; leave at least one to "
                "train"
            )

    def init(self, rng: jax.Array, geometry: Geometry, start: Prefix | None) -> Params:
        shape = geometry.main
        join = None if start is None else start.sites[geometry.main_site].join
        if join is None:
            size = (2, shape.layers, self.length, shape.kv_heads, shape.head_dim)
            join = KVPrefix(*jax.random.normal(rng, size))
        F = self.frozen
        pair = {"k_LPKH": join.k_LPKH, "v_LPKH": join.v_LPKH}
        params: dict[str, Params] = {
            "trained": {name: x_LPKH[:, F:] for name, x_LPKH in pair.items()}
        }
        if F:
            # What is called so is labelled frozen: see `train.partition.labels`.
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
        join = Site(KVPrefix(k_LPKH, v_LPKH))
        return Prefix.of({site: join}, offset=self.text_start, pinned=self.pinned)
