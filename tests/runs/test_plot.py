"""Plots of the loss curve."""

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from prefix_jax.errors import CheckpointError
from prefix_jax.runs import plot
from prefix_jax.runs.metric_writer import MetricWriter
from prefix_jax.runs.plot import plot_loss, plot_run, smoothed


def records(steps=60, spike=0.0):
    train = [{"step": s, "kind": "train", "loss": 1.0 + 3.0 / s} for s in range(1, steps + 1)]
    train[steps // 2]["loss"] += spike
    dev = [{"step": s, "kind": "dev", "loss": 1.2 + 3.0 / (s + 1)} for s in range(0, steps + 1, 20)]
    return train + dev


def red(picture):
    """Returns the pixels with the color of the dev loss."""
    return np.argwhere((picture[..., 0] > 0.7) & (picture[..., 1] < 0.5))


def test_plots_training_and_dev_loss_at_1000_by_600(tmp_path):
    plot_loss(records(), tmp_path / "loss.png", title="run")
    picture = imread(tmp_path / "loss.png")
    assert picture.shape[:2] == (600, 1000)
    assert len(red(picture)) > 100
    assert ((picture[..., 2] > 0.6) & (picture[..., 0] < 0.4)).sum() > 100


def test_cuts_off_a_single_spike(tmp_path):
    heights = []
    for spike in (0.0, 500.0):
        plot_loss(records(600, spike), tmp_path / "loss.png", title="run")
        dev = red(imread(tmp_path / "loss.png"))
        dev = dev[dev[:, 1] < 500]  # the legend is to the right
        heights.append(np.ptp(dev[:, 0]))
    assert heights[1] > heights[0] / 4


def test_plots_a_loss_of_zero(tmp_path):
    # As in float32, if a head is certain of every answer.
    plot_loss([{"step": 1, "kind": "dev", "loss": 0.0}], tmp_path / "loss.png", title="run")
    assert len(red(imread(tmp_path / "loss.png"))) > 10


@pytest.mark.parametrize("title", ["$x", "$a_$", "$\\frac$", "run_1"])
def test_shows_any_title_literally(tmp_path, title):
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
def test_plots_a_run_that_has_just_started(tmp_path, lines):
    for reduction in ("token", "example"):
        plot_loss(lines, tmp_path / "loss.png", title="run", reduction=reduction)
        assert imread(tmp_path / "loss.png").shape[:2] == (600, 1000)


def test_plots_the_whole_run_after_a_resume(tmp_path):
    for start, step in ((0, 1), (1, 2)):
        with MetricWriter(tmp_path, start) as writer:
            writer.write(step, "train", {"loss": 2.0})
            writer.write(step, "dev", {"loss": 2.0})
    path = plot_run(tmp_path, pytest.fail)
    assert path == tmp_path / "loss.png"
    assert len(red(imread(path))) > 10


def test_failure_to_plot_is_a_warning(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(plot, "plot_loss", broken)
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(1, "train", {"loss": 2.0})
    warnings = []
    plot_run(tmp_path, warnings.append)
    assert warnings == [f"{tmp_path}/loss.png was not drawn: no fonts"]


def test_does_not_change_the_callers_matplotlib(tmp_path):
    backend = matplotlib.get_backend(auto_select=False)
    pyplot = "matplotlib.pyplot" in sys.modules
    plot_loss(records(), tmp_path / "loss.png", title="run")
    assert matplotlib.get_backend(auto_select=False) == backend
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


def test_names_an_unwritable_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write .*loss\.png"):
        plot_loss(records(), tmp_path / "missing" / "loss.png", title="run")


def test_smoothing_keeps_constants_follows_slopes_and_reduces_noise():
    assert smoothed(np.full(50, 2.0)) == pytest.approx(2.0)
    slope = np.linspace(5.0, 1.0, 300)
    assert smoothed(slope)[:250] == pytest.approx(slope[:250])
    noise = np.random.default_rng(0).normal(size=300)
    assert smoothed(noise)[20:].std() < noise.std() / 3
