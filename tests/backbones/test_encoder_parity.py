"""Compares hidden states of encoders with transformers, for stored random models of every variant,
with padding, two token types, and with or without a task head in the checkpoint."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from prefix_jax.backbones.loading.pretrained import load
from prefix_jax.mesh import make_mesh
from prefix_jax.nn.attention.mask import TokenLayout

FIXTURES = Path(__file__).parents[1] / "fixtures" / "encoders"
VARIANTS = sorted(path.name for path in FIXTURES.iterdir())


MESHES = [(variant, {}) for variant in VARIANTS]
MESHES += [(variant, {"data": 2, "fsdp": 2, "tensor": 2}) for variant in ("bert", "electra")]
MESHES += [("bert", {"data": 2, "sequence": 4})]


@pytest.mark.parametrize(("variant", "mesh"), MESHES)
def test_states_match_transformers(variant: str, mesh: dict[str, int]) -> None:
    model = load(FIXTURES / variant, dtype="float32", mesh=make_mesh(**mesh))
    expected = np.load(FIXTURES / variant / "expected.npz")
    tokens = TokenLayout.plain(jnp.asarray(expected["present"]))
    tokens = tokens.replace(token_type_BT=jnp.asarray(expected["segments"]))
    h_BTD, _ = model.backbone.hidden(model.params, jnp.asarray(expected["ids"]), tokens)
    present = expected["present"]
    np.testing.assert_allclose(
        np.asarray(h_BTD)[present], expected["hidden"][present], rtol=0, atol=1e-4
    )
    assert model.backbone.arch.pooler == ("pooled" in expected)
    if model.backbone.arch.pooler:
        pooled_BD = model.backbone.pool(model.params, h_BTD[:, 0])
        np.testing.assert_allclose(pooled_BD, expected["pooled"], rtol=0, atol=1e-5)
