"""Adapters that PEFT wrote (`tests/fixtures/make_peft.py`), and edits of their copies."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import prefix_jax as pj
from prefix_jax.backbones.loading.pretrained import Pretrained, load

FIXTURES = Path(__file__).parent / "fixtures"
ADAPTERS = FIXTURES / "peft"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES = sorted(path.name for path in ADAPTERS.iterdir())
P, T = 3, 8


@functools.cache
def backbone(name: str) -> Pretrained:
    return load(FIXTURES / name, dtype="float32")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def imported(folder: Path, task: int | None = None) -> pj.Tuned:
    return pj.import_peft(folder, backbone(config_of(folder)["base_model_name_or_path"]), task=task)


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    arrays = load_file(folder / WEIGHTS)
    change(arrays)
    save_file(arrays, folder / WEIGHTS)
    return folder
