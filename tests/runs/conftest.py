"""A small model, a complete run of it, and its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_runs

from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.runs.checkpoints import Checkpoints


@pytest.fixture(scope="session")
def pretrained(tiny_model_dir: Path) -> Pretrained:
    return tiny_runs.on_one_device(tiny_model_dir)


@pytest.fixture(scope="session")
def whole(pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with default options that keeps every checkpoint."""
    directory = tmp_path_factory.mktemp("whole")
    tiny_runs.run(pretrained, directory, "train.keep_checkpoints=9")
    return directory


@pytest.fixture
def warned() -> list[str]:
    """Receives warnings."""
    return []


@pytest.fixture
def checkpoints(tmp_path: Path, warned: list[str]) -> Iterator[Checkpoints]:
    with Checkpoints(tmp_path / "checkpoints", keep=2, warn=warned.append) as opened:
        yield opened


@pytest.fixture(scope="module")
def without_plot() -> Iterator[None]:
    """Runs draw no loss curve, which costs 0.15 s of CPU time and a second for the import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefix_jax.runs.run.plot_run", lambda *_, **__: None)
        yield
