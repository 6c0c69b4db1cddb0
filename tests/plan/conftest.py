"""Fixtures: a model directory with only a config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from plans import TINY


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fixtures: a model directory with only a config."""
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(TINY))
    return directory
