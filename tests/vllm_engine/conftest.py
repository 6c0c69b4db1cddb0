"""A real vLLM, and what prefix_jax generates on the same model. Run with `make vllm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# `support` and the tests are modules of this folder.
sys.path.append(str(Path(__file__).parent))

# The interpreter of an environment with prefix_jax; vLLM has an environment of its own.
PYTHON = os.environ.get("PREFIX_JAX_PYTHON", "")

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of `reference.py`; vLLM's processes find the plugin in it."""
    directory = tmp_path_factory.mktemp("vllm")
    script = Path(__file__).with_name("reference.py")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(script.parents[2])}
    subprocess.run([PYTHON, script, directory], check=True, env=environment)
    sys.path.insert(0, str(directory / "served"))
    os.environ["PYTHONPATH"] = str(directory / "served")
    return directory


@pytest.fixture(scope="session")
def expected(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "expected.json").read_text())
