"""Settings that are valid and probably a mistake are noticed."""

from pathlib import Path

import pytest
import tiny
import tiny_runs

from prefix_jax import config
from prefix_jax.data.source import read_records
from prefix_jax.runs.config_warnings import careless

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
    return careless(config.parse(values, overrides), sources, steps)


def test_a_usual_run_gets_no_warning():
    assert warnings("optim.warmup_steps=10", dev=OTHERS, test=[*OTHERS, *OTHERS]) == ()


@pytest.mark.parametrize(
    ("overrides", "splits", "message"),
    [
        (["optim.warmup_steps=50"], {}, "optim.warmup_steps is 50, and the run has 10 steps: the "
         "learning rate only reaches 0.002 of 0.01; lower optim.warmup_steps"),
        (["optim.schedule=exponential", "optim.decay_every=10"], {}, "the learning rate never"),
        ([], {"dev": [dict(r) for r in RECORDS]}, "data.dev holds the same records as data.train"),
        ([], {"test": RECORDS}, "data.test holds the same records as data.train: the result says"),
        ([], {"dev": OTHERS, "test": OTHERS}, "data.test holds the same records as data.dev"),
        (["data.batch_size=8"], {}, "data.batch_size is 8, and there are 4 training records"),
        (["data.input=text"], {}, "data.input without a {field}: every example reads the same"),
        (["data.target=text"], {}, "data.target without a {field}: every example learns the same"),
    ],
)  # fmt: skip
def test_notices(overrides, splits, message):
    (warning,) = warnings(*overrides, **splits)
    assert message in warning


def test_a_run_shows_its_warnings(tmp_path: Path):
    pretrained = tiny_runs.on_one_device(tiny.write_model(tmp_path / "model"))
    console = tiny_runs.console()
    tiny_runs.run(
        pretrained, tmp_path / "run", "train.steps=1", "optim.warmup_steps=5", console=console
    )
    assert "warning: optim.warmup_steps is 5, and the run has 1 steps" in tiny_runs.shown(console)
