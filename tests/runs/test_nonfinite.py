"""A run stops in the state before a loss that is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs

from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.data.pipeline import Pipeline
from prefix_jax.errors import (
    NonFiniteError,
)

pytestmark = pytest.mark.usefixtures("without_plot")


def test_nonfinite_loss_stops_in_the_state_before_it_and_names_the_batch(
    pretrained: Pretrained, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    batch = Pipeline.batch

    def poisoned(self: Pipeline, step: int) -> Any:
        original = batch(self, step)
        weight_BM = np.where(original.weight_BM > 0, np.float32(np.inf), np.float32(0))
        return original.replace(weight_BM=weight_BM) if step == 7 else original

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "batch", poisoned)
        with pytest.raises(NonFiniteError) as raised:
            tiny_runs.run(pretrained, tmp_path, "train.keep_checkpoints=9")
    message = str(raised.value)
    assert message.startswith("step 8: loss nan")
    assert message.count("record ") == 4
    assert "optim.learning_rate" in message
    # The next step was already running, and changed nothing.
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [3, 6, 7]
    tiny_runs.run(pretrained, tmp_path, "train.keep_checkpoints=9")
    outcome, expected = tiny_runs.outcome(tmp_path), tiny_runs.outcome(whole)
    outcome["checkpoints"].remove(7)
    assert outcome == expected


def test_nonfinite_loss_at_the_first_step_is_not_blamed_on_the_learning_rate(
    pretrained: Pretrained, tmp_path: Path, monkeypatch
) -> None:
    batch = Pipeline.batch
    monkeypatch.setattr(
        Pipeline, "batch", lambda self, step: (b := batch(self, step)).replace(
            weight_BM=np.where(b.weight_BM > 0, np.float32(np.inf), np.float32(0))
        )
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="a lower learning rate will not help") as raised:
        tiny_runs.run(pretrained, tmp_path, "train.steps=1")
    assert str(raised.value).startswith("step 1: loss nan")
    assert "model's weights or config.json" in str(raised.value)


def test_diverging_learning_rate_is_an_error(pretrained: Pretrained, tmp_path: Path) -> None:
    options = (
        "optim.learning_rate=1e30",
        "optim.weight_decay=1e30",
        "optim.clip_norm=null",
        "optim.warmup_steps=0",
    )
    with pytest.raises(NonFiniteError, match=r"lower optim\.learning_rate"):
        tiny_runs.run(pretrained, tmp_path, *options)
    assert not (tmp_path / "prefix").exists()
