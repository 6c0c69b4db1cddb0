"""Equal weights have equal fingerprints; different weights have different ones."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from prefix_jax.backbones.fingerprint import fingerprint
from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.mesh import make_mesh

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"
PARAMS = {
    "embed": {"tokens_VD": jax.random.normal(jax.random.key(0), (16, 8))},
    "layers": {"mlp": {"up_DF": jax.random.normal(jax.random.key(1), (3, 8, 24))}},
}


def test_fingerprint_does_not_depend_on_mesh_or_dtype() -> None:
    marks = {
        load(FIXTURES / "llama_biases", dtype=dtype, mesh=mesh).fingerprint
        for dtype in ("float32", "bfloat16")
        for mesh in (None, make_mesh(1, 4, 2), make_mesh(2, 2, 2))
    }
    assert len(marks) == 1


def test_fingerprint_is_stable_across_versions() -> None:
    """Stored prefixes contain fingerprints: changing the scheme orphans them."""
    params = {"embed": {"tokens_VD": jnp.arange(12.0).reshape(3, 4) / 8}}
    assert fingerprint(params) == "68b80ab8db75988f3759f7931a770feb"


@pytest.mark.parametrize("path", [("embed", "tokens_VD"), ("layers", "mlp", "up_DF")])
def test_one_changed_value_changes_the_fingerprint(path: tuple[str, ...]) -> None:
    def change(at, x: jax.Array) -> jax.Array:
        here = tuple(key.key for key in at) == path
        return x.at[(-1,) * x.ndim].multiply(1.01) if here else x

    changed = jax.tree_util.tree_map_with_path(change, PARAMS)
    assert fingerprint(changed) != fingerprint(PARAMS)


def test_moved_values_change_the_fingerprint() -> None:
    tokens_VD, up_LDF = PARAMS["embed"]["tokens_VD"], PARAMS["layers"]["mlp"]["up_DF"]
    marks = {
        fingerprint({"embed": {"tokens_VD": tokens_VD}, "layers": {"mlp": {"up_DF": moved}}})
        for moved in (up_LDF, up_LDF[::-1], up_LDF[:, ::-1], up_LDF[:, :, ::-1])
    }
    assert len(marks) == 4


def test_subnormal_values_count_as_zero() -> None:
    """Some devices flush subnormal values, and the sign of zero may be lost."""
    zeros, tiny = jnp.zeros((4, 4)), jnp.full((4, 4), -1e-40)
    assert (
        fingerprint({"a_DF": zeros}) == fingerprint({"a_DF": tiny}) == fingerprint({"a_DF": -zeros})
    )


def test_fingerprint_covers_values_on_other_devices() -> None:
    mesh = make_mesh(1, 8, 1)
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    spread = jax.device_put({"x_VD": PARAMS["embed"]["tokens_VD"]}, split)
    assert fingerprint(spread) == fingerprint({"x_VD": PARAMS["embed"]["tokens_VD"]})
