"""Stored prefixes on the small random models of `tests/fixtures`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from prefix_jax import artifact
from prefix_jax.artifact import BackboneCard
from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.backbones.starts import starts_from_text
from prefix_jax.prefix import Embeds, Hidden, Prefix, Produced

FIXTURES = Path(__file__).parents[1] / "fixtures" / "backbones"

Save = Callable[..., Path]


@pytest.fixture(scope="session")
def pretrained() -> Pretrained:
    return load(FIXTURES / "llama_grouped", dtype="float32")


@pytest.fixture(scope="session")
def forms(pretrained: Pretrained) -> dict[str, Produced]:
    """The same prefix in three forms that produce equal keys and values."""
    ids_P = jnp.arange(3, 9, dtype=jnp.int32)
    embeds, hidden, prefix = jax.jit(starts_from_text, static_argnums=0)(
        pretrained.backbone, pretrained.params, ids_P
    )
    assert (type(embeds), type(hidden), type(prefix)) == (Embeds, Hidden, Prefix)
    return {"embeds": embeds, "hidden": hidden, "kv": prefix}


@pytest.fixture
def save(tmp_path: Path, pretrained: Pretrained) -> Save:
    """Stores a prefix of the model and returns its path."""

    def save(produced: Produced, **backbone: str) -> Path:
        arch = pretrained.backbone.arch
        known = {"source": pretrained.source, "fingerprint": pretrained.fingerprint}
        known |= {"model_type": arch.model_type, "dtype": "float32"}
        card = artifact.make_card(
            produced,
            arch.geometry,
            BackboneCard(**known | backbone),
            method={"name": "some", "length": 6, "mid_dim": None},
            steps=12,
            metrics={"loss": 2.5},
        )
        artifact.save(tmp_path / "stored", produced, card)
        return tmp_path / "stored"

    return save
