"""The loss curve is a picture of what was recorded."""

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from prefix_jax.errors import CheckpointError
from prefix_jax.runs.console import Report
from prefix_jax.runs.metric_writer import MetricWriter
from prefix_jax.runs.plot import plot_loss, smoothed


def records(steps=60, spike=0.0):
    train = [{"step": s, "kind": "train", "loss": 1.0 + 3.0 / s} for s in range(1, steps + 1)]
    train[steps // 2]["loss"] += spike
    dev = [{"step": s, "kind": "dev", "loss": 1.2 + 3.0 / (s + 1)} for s in range(0, steps + 1, 20)]
    return train + dev


def red(picture):
    """Where the colour of the dev loss is."""
    return np.argwhere((picture[..., 0] > 0.7) & (picture[..., 1] < 0.5))


def test_the_picture_is_1000_by_600_and_shows_training_and_dev(tmp_path):
    plot_loss(records(), tmp_path / "loss.png", title="run")
    picture = imread(tmp_path / "loss.png")
    assert picture.shape[:2] == (600, 1000)
    assert len(red(picture)) > 100
    assert ((picture[..., 2] > 0.6) & (picture[..., 0] < 0.4)).sum() > 100


def test_a_single_spike_does_not_flatten_the_rest(tmp_path):
    heights = []
    for spike in (0.0, 500.0):
        plot_loss(records(600, spike), tmp_path / "loss.png", title="run")
        dev = red(imread(tmp_path / "loss.png"))
        dev = dev[dev[:, 1] < 500]  # the legend is to the right
        heights.append(np.ptp(dev[:, 0]))
    assert heights[1] > heights[0] / 4


def test_a_loss_of_zero_is_drawn(tmp_path):
    # As float32 has it, where a head is certain of every answer.
    plot_loss([{"step": 1, "kind": "dev", "loss": 0.0}], tmp_path / "loss.png", title="run")
    assert len(red(imread(tmp_path / "loss.png"))) > 10


@pytest.mark.parametrize("title", ["$x", "$a_$", "$\\frac$", "run_1"])
def test_any_title_is_shown_as_it_stands(tmp_path, title):
    plot_loss(records(), tmp_path / "loss.png", title=title)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        records()[:1],
        records()[-1:],
        [{"step": 1, "kind": "train", "loss": None}, {"step": 2, "kind": "dev", "bleu": 1.0}],
    ],
    ids=["nothing", "one step", "one evaluation", "no loss"],
)
def test_a_run_that_has_hardly_begun_is_drawn_too(tmp_path, lines):
    for reduction in ("token", "example"):
        plot_loss(lines, tmp_path / "loss.png", title="run", reduction=reduction)
        assert imread(tmp_path / "loss.png").shape[:2] == (600, 1000)


def test_a_report_draws_the_whole_run_also_after_a_resume(tmp_path):
    record = MetricWriter(tmp_path, 0)
    record.write(1, "train", {"loss": 2.0})
    record.write(1, "dev", {"loss": 2.0})
    record.close()
    with Report(tmp_path, total_steps=2, start_step=1, quiet=True) as report:
        path = report.plot()
    assert path == tmp_path / "loss.png"
    assert len(red(imread(path))) > 10


def test_the_callers_matplotlib_stays_as_it_is(tmp_path):
    backend = matplotlib.get_backend(auto_select=False)
    pyplot = "matplotlib.pyplot" in sys.modules
    plot_loss(records(), tmp_path / "loss.png", title="run")
    assert matplotlib.get_backend(auto_select=False) == backend
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


def test_an_unwritable_picture_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write .*loss\.png"):
        plot_loss(records(), tmp_path / "missing" / "loss.png", title="run")


def test_smoothing_keeps_constants_follows_slopes_and_calms_noise():
    assert smoothed(np.full(50, 2.0)) == pytest.approx(2.0)
    slope = np.linspace(5.0, 1.0, 300)
    assert smoothed(slope)[:250] == pytest.approx(slope[:250])
    noise = np.random.default_rng(0).normal(size=300)
    assert smoothed(noise)[20:].std() < noise.std() / 3
