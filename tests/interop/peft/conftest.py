"""Copies of the adapters that PEFT wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import ADAPTERS, CONFIG, config_of


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """Copies a stored adapter and changes its configuration."""

    def copy(name: str = "prefix", **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(ADAPTERS / name, folder)
        content = config_of(folder) | changes
        (folder / CONFIG).write_text(json.dumps(content), encoding="utf-8")
        return folder

    return copy
