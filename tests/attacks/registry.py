"""The registry of targets, and helpers for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import tiny

from prefix_jax.backbones.loading.pretrained import load

FIXTURES = Path(__file__).parents[1] / "fixtures"
Attempt = Callable[[Random], None]
TARGETS: dict[str, Callable[[Path], Attempt]] = {}


def target(function: Callable[[Path], Attempt]) -> Callable[[Path], Attempt]:
    """Registers a target under its name, with hyphens."""
    TARGETS[function.__name__.strip("_").replace("_", "-")] = function
    return function


def case_rng(name: str, seed: int, case: int) -> Random:
    """Returns the random generator of one case, so that the case can be repeated alone."""
    return Random(f"{name}/{seed}/{case}")


def tokenizer(folder: Path) -> Any:
    """Returns the tokenizer of a new tiny model."""
    return load(tiny.write_model(folder / "model")).tokenizer


@contextlib.contextmanager
def replaced(file: Path, content: bytes) -> Iterator[None]:
    """Replaces the content of a file inside a `with` block."""
    original = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(original)
