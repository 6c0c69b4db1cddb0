"""A stored prefix."""

from __future__ import annotations

from pathlib import Path

import pytest
from stored_prefixes import card_of, keys_values

from prefix_jax import artifact


@pytest.fixture
def stored(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A stored prefix of keys and values; tests may parametrize the container."""
    produced = keys_values()
    artifact.save(tmp_path / "p", produced, card_of(produced), getattr(request, "param", "orbax"))
    return tmp_path / "p"
