"""Warnings about settings that are valid, but probably a mistake."""

from pathlib import Path

import pytest
import tiny
import tiny_runs

from prefix_jax import config
from prefix_jax.data.source import read_records
from prefix_jax.runs.config_warnings import config_warnings
from prefix_jax.tasks import make_task

RECORDS = [{"a": str(i), "b": "x"} for i in range(4)]
OTHERS = [{"a": "other", "b": "y"}]


def warnings(*overrides: str, steps: int = 10, **splits) -> tuple[str, ...]:
    values = {
        "model": {"path": "m"},
        "data": {"input": "{a}", "target": "{b}", "batch_size": 2},
        "train": {"steps": steps},
        "output_dir": "o",
    }
    sources = {name: read_records(split) for name, split in {"train": RECORDS, **splits}.items()}
    parsed = config.parse(values, overrides)
    task = make_task(parsed.data, parsed.task)
    return config_warnings(parsed.data, parsed.optim, task, sources, steps)


def test_typical_run_has_no_warnings():
    assert warnings("optim.warmup_steps=10", dev=OTHERS, test=[*OTHERS, *OTHERS]) == ()


@pytest.mark.parametrize(
    ("overrides", "splits", "message"),
    [
        (["optim.warmup_steps=50"], {}, "optim.warmup_steps is 50, but the run has 10 steps: the "
         "learning rate only reaches 0.002 of 0.01; lower optim.warmup_steps"),
        (["optim.schedule=exponential", "optim.decay_every=10"], {}, "the learning rate never"),
        ([], {"dev": [dict(r) for r in RECORDS]}, "data.dev has the same records as data.train"),
        ([], {"test": RECORDS}, "data.test has the same records as data.train: the result does"),
        ([], {"dev": OTHERS, "test": OTHERS}, "data.test has the same records as data.dev"),
        (["data.batch_size=8"], {}, "data.batch_size is 8, but there are only 4 training records"),
        (["data.input=text"], {}, "data.input without a {field}: every example has the same input"),
        (["data.target=text"], {}, "data.target without a {field}: every example has the same"),
    ],
)  # fmt: skip
def test_warns(overrides, splits, message):
    (warning,) = warnings(*overrides, **splits)
    assert message in warning


def test_run_prints_warnings(tmp_path: Path):
    pretrained = tiny_runs.on_one_device(tiny.write_model(tmp_path / "model"))
    console = tiny_runs.console()
    tiny_runs.run(
        pretrained, tmp_path / "run", "train.steps=1", "optim.warmup_steps=5", console=console
    )
    assert "warning: optim.warmup_steps is 5, but the run has 1 steps" in tiny_runs.shown(console)
