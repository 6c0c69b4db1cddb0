"""Runs store an n-gram table of their targets with the prefix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny_runs

from prefix_jax import api, artifact
from prefix_jax.backbones.loading.pretrained import Pretrained


def test_run_stores_the_table_of_its_targets(pretrained: Pretrained, tmp_path: Path) -> None:
    run = tiny_runs.run(pretrained, tmp_path / "on", "train.steps=1")
    (made,) = run.ngrams.values()
    loaded = api.load_prefix(run.directory, pretrained)
    assert loaded.ngrams is not None
    np.testing.assert_array_equal(loaded.ngrams.entry_G2W, made.entry_G2W)
    targets = {
        token
        for record in tiny_runs.RECORDS
        for token in pretrained.tokenizer(record["total"])["input_ids"]
    }
    tokens = set(made.token_GW[made.entry_G2W[:, 0] > 0].tolist())
    assert tokens <= targets | {pretrained.tokenizer.eos_token_id}
    loaded.save(tmp_path / "copy", "safetensors")
    copy = artifact.load_ngrams(tmp_path / "copy")
    assert copy is not None
    np.testing.assert_array_equal(copy.entry_G2W, made.entry_G2W)


def test_config_turns_the_table_off(pretrained: Pretrained, tmp_path: Path) -> None:
    run = tiny_runs.run(pretrained, tmp_path, "train.steps=1", "train.speculative_ngrams=false")
    assert run.ngrams == {}
    assert artifact.load_ngrams(run.directory) is None
    assert api.load_prefix(run.directory, pretrained).ngrams is None
