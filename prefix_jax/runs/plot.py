"""The loss curve of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prefix_jax.errors import CheckpointError, PrefixJaxError, reason
from prefix_jax.runs.metric_writer import read_metrics
from prefix_jax.terminal import escape

_TRAIN, _DEV, _INK = "#3b6fb6", "#d1495b", "#444444"


def plot_run(
    directory: Path,
    warn: Callable[[str], None],
    *,
    title: str | None = None,
    reduction: Literal["token", "example"] = "token",
) -> Path:
    """Draws the loss of a run so far, including the part before a resume, into `loss.png`.

    Args:
        directory: the run directory.
        warn: receives a warning if the plot cannot be drawn, which does not fail the run.
        title: None for the name of the directory.
        reduction: of the training loss, see `plot_loss`.

    Returns:
        The path of the picture.

    Raises:
        CheckpointError: `metrics.jsonl` cannot be read, or the picture cannot be written.
    """
    path = directory / "loss.png"
    name = escape(title or f"Loss of {directory.resolve().name}")
    try:
        plot_loss(read_metrics(directory), path, title=name, reduction=reduction)
    except PrefixJaxError:
        raise
    except Exception as error:  # a bug in plotting must not cost the trained prefix
        warn(f"{path} was not drawn: {reason(error)}")
    return path


def plot_loss(
    records: Iterable[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    reduction: Literal["token", "example"] = "token",
) -> None:
    """Draws training loss, raw and smoothed, and dev loss with its best evaluation marked.

    Args:
        records: lines of `metrics.jsonl`, see `read_metrics`.
        path: the PNG to write, 1000 × 600 pixels.
        title: the title above the curve.
        reduction: of the training loss. Dev loss is always per token, and has its own axis if the
            two cannot be compared.

    Raises:
        CheckpointError: the picture cannot be written.
    """
    # Imported here because the import takes a second. pyplot is not used, so that the caller's
    # backend and figures stay unchanged.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = list(records)
    steps, losses = _series(records, "train")
    dev_steps, dev_losses = _series(records, "dev")

    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=14, pad=12, color=_INK, parse_math=False)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"loss (nats per {reduction})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    dev_axes = axes
    if reduction == "example" and len(dev_steps):
        dev_axes = axes.twinx()
        dev_axes.set_ylabel("dev loss (nats per token)", color=_DEV)
        dev_axes.spines["top"].set_visible(False)

    drawn = []
    if len(steps):
        smooth = smoothed(losses)
        raw: dict[str, Any] = {"color": _TRAIN, "alpha": 0.4, "linewidth": 0.8}
        raw["marker"] = "o" if len(steps) == 1 else None
        drawn += axes.plot(steps, losses, **raw, label="training")
        drawn += axes.plot(steps, smooth, color=_TRAIN, linewidth=2, label="training, smoothed")
        # Cut off a single spike rather than flatten everything else.
        shared = dev_losses if dev_axes is axes else dev_losses[:0]
        inside = np.concatenate([smooth, shared, np.quantile(losses, [0.0, 0.99])])
        bottom, top = inside.min(), inside.max()
        pad = 0.05 * (top - bottom) or 0.05
        axes.set_ylim(bottom - pad, top + pad)
    if len(dev_steps):
        style: dict[str, Any] = {"color": _DEV, "marker": "o", "markersize": 5, "linewidth": 1.2}
        drawn += dev_axes.plot(dev_steps, dev_losses, **style, label="dev")
        best = int(np.argmin(dev_losses))
        drawn += dev_axes.plot(
            dev_steps[best],
            dev_losses[best],
            color=_DEV,
            linestyle="none",
            marker="*",
            markersize=17,
            markeredgecolor="white",
            label=f"best dev: {dev_losses[best]:.3f} at step {dev_steps[best]}",
        )
    if drawn:
        dev_axes.legend(handles=drawn, frameon=False, loc="upper right")

    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def smoothed(values: np.ndarray) -> np.ndarray:
    """Averages twice over a centred window of a fifteenth of the values.

    Once is not enough: the mean jumps whenever an outlier enters or leaves the window. At the
    start, where a loss falls steeply, the window stays symmetric and narrows down to the first
    value. At the end, where only noise is left, it is cut off.
    """
    index = np.arange(len(values))
    reach = np.minimum(max(1, len(values) // 30), index)
    low, high = index - reach, np.minimum(index + reach + 1, len(values))
    for _ in range(2):
        total = np.concatenate([[0.0], np.cumsum(values)])
        values = (total[high] - total[low]) / (high - low)
    return values


def _series(records: Iterable[Mapping[str, Any]], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and losses of one kind, without null (not finite) losses."""
    points = {
        record["step"]: record["loss"]
        for record in records
        if record.get("kind") == kind and record.get("loss") is not None
    }
    steps = sorted(points)
    return np.array(steps, int), np.array([points[step] for step in steps], float)
