"""Stored prefixes, exported for vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefix_jax.interop.vllm import export_vllm
from prefix_jax.interop.vllm.plugin.stored import Shape
from prefix_jax.prefix import Produced


@pytest.fixture
def served(forms: dict[str, Produced], save, tmp_path: Path) -> Path:
    """A directory with one prefix of six slots, named "six"."""
    export_vllm(save(forms["kv"]), tmp_path / "served" / "six")
    return tmp_path / "served"


@pytest.fixture
def shape(pretrained) -> Shape:
    """The shape of the model that the prefixes are made for."""
    geometry = pretrained.backbone.arch.geometry
    return Shape(
        layers=geometry.main.layers,
        kv_heads=geometry.main.kv_heads,
        head_dim=geometry.main.head_dim,
        hidden=geometry.d_model,
        vocab=geometry.vocab,
        window=False,
    )
