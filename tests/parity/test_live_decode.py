"""Decoding equals that of transformers and PEFT, live, on more models and other seeds.

Collected by `make parity` alone, whose environment has torch, transformers and peft.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

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
@pytest.mark.parametrize(
    "name",
    ["gpt2", "smollm", "qwen3", "mistral_window", "qwen2_window", "gemma2", "gemma3_text", "neox"],
)
def test_decoding_equals_that_of_transformers(
    name: str, behind: bool, seed: int, difference: Any
) -> None:
    directory = TESTS / "fixtures" / "backbones"
    for cases, ends in (
        (MAKER.GREEDY, seed),
        (MAKER.GREEDY_CONSTRAINED, 1),
        (MAKER.BEAMS, 3 - seed),
        (MAKER.BEAMS_CONSTRAINED, seed),
    ):
        for run in MAKER.run(directory, name, cases, behind, ends, seed):
            delta = STORED.check(run, STORED.model(name))
            difference("scores of decoding, relative", delta, 1e-5, name)


@pytest.mark.parametrize("behind", [False, True], ids=["bare", "prefix"])
@pytest.mark.parametrize("name", ["t5", "t5_gated", "mt5", "bart"])
def test_what_encoder_decoders_write_equals_that_of_transformers(name: str, behind: bool) -> None:
    directory = TESTS / "fixtures" / "encoder_decoders"
    for cases, ends in (
        (MAKER.GREEDY, 1),
        (MAKER.GREEDY_CONSTRAINED, 2),
        (MAKER.TWO_SIDED, 2),
        (MAKER.TWO_SIDED_CONSTRAINED, 1),
    ):
        for run in MAKER.run(directory, name, cases, behind, ends, seed=1):
            STORED.check(run, STORED.model(name))


def test_the_stored_processors_are_those_of_transformers(difference: Any) -> None:
    for name, made in MAKER.processed(seed=0).items():
        # What a processor forbids is minus infinity on both sides.
        np.testing.assert_array_equal(np.isfinite(made), np.isfinite(PROCESSORS.EXPECTED[name]))
        expected = PROCESSORS.EXPECTED[name]
        delta = np.subtract(made, expected, where=np.isfinite(made), out=np.zeros_like(expected))
        difference("stored processors", delta, 1e-5, name)
