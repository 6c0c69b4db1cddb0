"""Decoding equals that of transformers and PEFT, live, on more models and other seeds.

Collected by `make parity` alone, whose environment has torch, transformers and peft.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

TESTS = Path(__file__).parents[1]


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _import(TESTS / "fixtures" / "make_decode.py")
STORED = _import(TESTS / "decode" / "test_transformers.py")
PROCESSORS = _import(TESTS / "decode" / "test_processors.py")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("behind", [False, True], ids=["bare", "prefix"])
@pytest.mark.parametrize("name", ["gpt2", "smollm", "qwen3", "mistral_window", "qwen2_window"])
def test_decoding_equals_that_of_transformers(name: str, behind: bool, seed: int) -> None:
    directory = TESTS / "fixtures" / "backbones"
    for cases, ends in (
        (MAKER.GREEDY, seed),
        (MAKER.GREEDY_CONSTRAINED, 1),
        (MAKER.BEAMS, 3 - seed),
        (MAKER.BEAMS_CONSTRAINED, seed),
    ):
        for run in MAKER.run(directory, name, cases, behind, ends, seed):
            STORED.check(run, STORED.model(name))


def test_the_stored_processors_are_those_of_transformers() -> None:
    for name, made in MAKER.processed(seed=0).items():
        np.testing.assert_allclose(made, PROCESSORS.EXPECTED[name], rtol=1e-6, err_msg=name)
