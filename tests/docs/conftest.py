"""A working directory in which the documentation's code runs in seconds."""

from pathlib import Path

import pytest

from prefix_jax import api
from prefix_jax.backbones.loading import pretrained

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fast_docs(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces all models by a tiny one, limits `pj.fit` to three steps, and links the data."""
    find = pretrained.find
    monkeypatch.setattr(
        pretrained,
        "find",
        lambda source, *rest: find(source if Path(source).is_dir() else tiny_model_dir, *rest),
    )
    fit = api.fit
    monkeypatch.setattr(
        api, "fit", lambda *args, steps, **rest: fit(*args, steps=min(steps, 3), **rest)
    )
    for folder in ("examples", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for data in (ROOT / "examples" / "stations").glob("*.jsonl"):
        (tmp_path / data.name).symlink_to(data)
    monkeypatch.chdir(tmp_path)
