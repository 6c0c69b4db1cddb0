"""Loading needs memory for the model, one more parameter, and the compiler."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc"
)
COMPILER_MB = 60


def _benchmark() -> ModuleType:
    script = Path(__file__).parents[3] / "benchmarks" / "load_memory.py"
    spec = importlib.util.spec_from_file_location("load_memory", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("dtype", "devices"), [("float32", 1), ("bfloat16", 4)])
def test_peak_memory_stays_below_the_model_and_one_parameter(
    dtype: str, devices: int, tmp_path: Path
) -> None:
    benchmark = _benchmark()
    tiny = benchmark.write_llama(tmp_path / "tiny", L=2, D=64, F=64, V=16, dtype="float32")
    model = benchmark.write_llama(tmp_path / "m", L=12, D=512, F=2048, V=8000, dtype="bfloat16")
    figures = benchmark.measure(tiny, str(model), dtype, devices)
    assert figures["model_mb"] > 100
    assert figures["peak_mb"] < figures["bound_mb"] + COMPILER_MB
