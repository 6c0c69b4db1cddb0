"""Configs, data and backbones that cannot become a run are errors before anything is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny_runs

from prefix_jax import config as configs
from prefix_jax.backbones.loading.pretrained import Pretrained, load
from prefix_jax.errors import (
    ConfigError,
    ContextError,
    DataError,
    MeshError,
    PrefixJaxError,
)
from prefix_jax.mesh import make_mesh
from prefix_jax.runs.run import run

JSONL = '{"sum": "1+1", "total": "02"}\n'


@dataclasses.dataclass(frozen=True)
class Bad:
    """An invalid run and the parts of its error message."""

    error: type[PrefixJaxError]
    parts: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    train: list[dict[str, Any]] | None = dataclasses.field(
        default_factory=lambda: tiny_runs.RECORDS
    )
    file: str | None = None


BAD = {
    "missing field": Bad(
        DataError,
        ("record 1: no field 'summ' (did you mean 'sum'?)", "'sum', 'total'"),
        ("data.input={summ}",),
    ),
    "no records": Bad(DataError, ("the records: no records",), train=[]),
    "empty file": Bad(DataError, ("train.jsonl: no records",), file="\n"),
    "malformed line": Bad(
        DataError, ("train.jsonl:3: malformed JSON",), file=2 * JSONL + '{"sum": \n' + JSONL
    ),
    "NaN label": Bad(
        DataError,
        ("record 2: field 'total' is NaN",),
        train=[{"sum": "1", "total": 2.0}, {"sum": "1", "total": float("nan")}],
    ),
    "longer than the context": Bad(
        DataError,
        ("record 1", "max_length 252"),
        train=[{"sum": "1+1", "total": "0" * 260}],
    ),
    "target that vanishes": Bad(
        DataError, ("record 1", "max_length 3", "on_overflow: drop"), ("data.max_length=3",)
    ),
    "all dropped": Bad(
        DataError,
        ("all 20 examples exceed max_length 3",),
        ("data.max_length=3", "data.on_overflow=drop"),
    ),
    "text beyond the positions": Bad(
        ContextError, ("data.max_length 253", "256 positions", "252"), ("data.max_length=253",)
    ),
    "prefix beyond the positions": Bad(
        ContextError, ("position 300", "256 positions", "shorter prefix"), ("method.length=300",)
    ),
    "text moved beyond the positions": Bad(
        ContextError, ("position 256", "256 positions"), ("method.text_position=256",)
    ),
    "negative text position": Bad(
        ConfigError,
        ("method.text_position: must be a non-negative integer",),
        ("method.text_position=-1",),
    ),
    "unknown method": Bad(ConfigError, ("'prompts'", "'prompt'"), ("method=prompts",)),
    "no data": Bad(ConfigError, ("data.train",), train=None),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_refuses_bad_input_before_writing_anything(
    pretrained: Pretrained, tmp_path: Path, bad: Bad
) -> None:
    overrides = list(bad.overrides)
    if bad.file is not None:
        (tmp_path / "train.jsonl").write_text(bad.file)
        overrides.append(f"data.train={tmp_path / 'train.jsonl'}")
    train = None if bad.file is not None else bad.train
    with pytest.raises(bad.error) as raised:
        tiny_runs.run(pretrained, tmp_path / "run", *overrides, train=train)
    for part in bad.parts:
        assert part in str(raised.value)
    # The directory is free for the corrected command.
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [("data.train=nowhere.jsonl", "no such file"), ("data.input={facts}", "no field 'facts'")],
)
def test_finds_mistakes_in_the_data_before_loading_the_backbone(
    tmp_path: Path, override: str, message: str
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"sum": "1+1", "total": "2"}\n')
    config = configs.parse(
        {
            "model": {"path": str(tmp_path / "no model")},
            "data": {"train": str(path), "input": "{sum}", "target": "{total}"},
            "train": {"steps": 1},
            "output_dir": str(tmp_path / "run"),
        },
        [override],
    )
    with pytest.raises(DataError, match=message):
        run(config, quiet=True)


def test_refuses_a_batch_size_that_the_mesh_does_not_divide(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    everywhere = load(tiny_model_dir, mesh=make_mesh(8, 1, 1))
    with pytest.raises(MeshError, match=r"batch_size 4 .* 8 batch shards .* multiple of 8"):
        tiny_runs.run(everywhere, tmp_path)
    assert jax.device_count() == 8


def test_full_fine_tuning_requires_float32_weights(tiny_model_dir: Path, tmp_path: Path) -> None:
    narrow = load(tiny_model_dir, dtype="bfloat16", mesh=make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(ConfigError, match=r"model\.dtype: float32"):
        tiny_runs.run(narrow, tmp_path, "method=full")
