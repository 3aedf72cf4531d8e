"""Plots of a comparison: IoU against percentile, precision against recall, quality against time."""

from __future__ import annotations

from io import BytesIO
from itertools import cycle

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from explainers.evaluation.metrics.localisation import PERCENTILES
from explainers.evaluation.statistics import ROW

SIZE, DPI = (8.0, 5.0), 110


def plots(table: pd.DataFrame, costs: pd.DataFrame) -> dict[str, bytes]:
    """PNG files by name; a curve is that of a method's row of the highest average precision.

    Rows of fewer images than the method's others (`limits`) are left out of curves.

    Args:
        table: Long form: method, views, smoothing, metric, mean, low, high, n.
        costs: Columns method, views, control, seconds (per image).
    """
    images = table[table["metric"] == "average_precision"].set_index(ROW)["n"]
    means = table.pivot_table("mean", ROW, "metric", sort=False).loc[images.index]
    most = means[images == images.groupby("method").transform("max")]
    best = most.loc[most.groupby("method", sort=False)["average_precision"].idxmax().tolist()]
    controls = set(costs.loc[costs["control"], "method"])
    drawn = {
        "iou": lines(best, controls, "iou", "percentile of the map", "IoU"),
        "quality_time": quality_time(means.assign(n=images), costs, controls),
    }
    if f"precision_{PERCENTILES[0]:g}" in best:  # not in the files of older comparisons
        drawn["precision_recall"] = lines(best, controls, "precision", "recall", "precision")
    return {name: png(figure) for name, figure in drawn.items()}


def lines(best: pd.DataFrame, controls: set[str], metric: str, across: str, up: str) -> Figure:
    """One line a method over the percentiles, against the percentile or against the recall there.

    Args:
        best: One line a row, metrics across.
        controls: Methods that are drawn grey.
        metric: "iou" or "precision".
        across: Label; "recall" puts the recall there.
        up: Label.
    """
    figure, axes = empty(across, up)
    colours = cycle(colormaps["tab20"].colors)  # type: ignore[attr-defined]
    names = [f"{p:g}" for p in PERCENTILES]
    for line in best.reset_index().to_dict("records"):
        control = line["method"] in controls
        axes.plot(
            [line[f"recall_{p}"] for p in names] if across == "recall" else list(PERCENTILES),
            [line[f"{metric}_{p}"] for p in names],
            "--" if control else "-",
            marker="." if not control else None,
            color="0.6" if control else next(colours),
            label=f"{line['method']} ({line['views']}, {line['smoothing']})",
        )
    legend(figure, axes)
    return figure


def quality_time(means: pd.DataFrame, costs: pd.DataFrame, controls: set[str]) -> Figure:
    """Average precision of each method, plain and with views, raw or smoothed, over its seconds.

    Args:
        means: One line a row, metrics and n, the number of images, across.
        costs: As in `plots`.
        controls: Methods that are drawn grey.
    """
    figure, axes = empty("seconds per image", "average precision")
    rows = means.groupby(["method", "views"], sort=False)[["average_precision", "n"]].max()
    seconds = costs.groupby(["method", "views"])["seconds"].mean()
    for line in pd.concat([rows, seconds], axis=1, join="inner").reset_index().to_dict("records"):
        control, at = line["method"] in controls, (line["seconds"], line["average_precision"])
        marker = "x" if control else ("o" if line["views"] == "plain" else "^")
        colour = "0.6" if control else "tab:blue"
        fill = colour if control or line["n"] == rows["n"].max() else "none"
        axes.scatter(*at, marker=marker, color=colour, facecolor=fill, s=18)
        axes.annotate(f" {line['method']}", at, fontsize=6, color="0.5" if control else "0.1")
    axes.set_xscale("log")
    kinds = "circles: plain, triangles: views, hollow: on fewer images, crosses: controls"
    axes.set_title(kinds, fontsize=8)
    return figure


def curves(table: pd.DataFrame, metric: str, across: str) -> bytes:
    """PNG of a metric over the steps, a line and a band (its interval) for each method.

    Args:
        table: Columns method, step, metric, mean, low, high; one row per method and step.
        metric: Drawn metric.
        across: Label of the steps.
    """
    figure, axes = empty(across, metric)
    parts = table[table["metric"] == metric].groupby("method", sort=False)
    colours = cycle(colormaps["tab20"].colors)  # type: ignore[attr-defined]
    for (method, part), colour in zip(parts, colours, strict=False):
        axes.plot(part["step"], part["mean"], marker=".", color=colour, label=str(method))
        axes.fill_between(part["step"], part["low"], part["high"], color=colour, alpha=0.15)
    legend(figure, axes)
    return png(figure)


def legend(figure: Figure, axes: Axes) -> None:
    """Names of the lines on the right; many make the figure higher."""
    shown = axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.set_figheight(max(SIZE[1], 0.14 * len(shown.get_texts())))


def empty(across: str, up: str) -> tuple[Figure, Axes]:
    """A figure with labelled axes."""
    figure = Figure(SIZE, DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(color="0.9")
    return figure, axes


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
