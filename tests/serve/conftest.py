"""A server with a few prefixes, which the tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import serving

import prefix_jax as pj


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> pj.Pretrained:
    return serving.write_model(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="session")
def tuned(model: pj.Pretrained) -> dict[str, pj.Tuned]:
    """Prefixes by name."""
    return {
        "alpha": serving.tune(model, 1),
        "beta": serving.tune(model, 2, length=7),
        "stored": serving.tune(model, 3, max_new_tokens=3, num_beams=4),
    }


@pytest.fixture(scope="session")
def directory(tuned: dict[str, pj.Tuned], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the prefixes."""
    directory = tmp_path_factory.mktemp("prefixes")
    for name, prefix in tuned.items():
        prefix.save(directory / name, "safetensors")
    return directory


@pytest.fixture(scope="session")
def server(model: pj.Pretrained, directory: Path) -> Iterator[serving.Running]:
    prefixes = {name: directory / name for name in ("alpha", "beta", "stored")}
    with serving.running(serving.make_engine(model), prefixes=prefixes) as server:
        yield server
