from __future__ import annotations

from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from explainers.evaluation import figures
from explainers.evaluation.figures import lines, plots, quality_time
from explainers.evaluation.metrics.localisation import PERCENTILES
from explainers.evaluation.statistics import ROW

VALUES = {("Good", "plain"): 0.5, ("Good", "views"): 0.7, ("Random map", "plain"): 0.1}


def long() -> pd.DataFrame:
    rows = []
    for (method, views), value in VALUES.items():
        rows.append((method, views, "raw", "average_precision", value))
        for k, p in enumerate(PERCENTILES):
            rows.append((method, views, "raw", f"iou_{p:g}", value / (k + 1)))
            rows.append((method, views, "raw", f"precision_{p:g}", value))
            rows.append((method, views, "raw", f"recall_{p:g}", 1 / (k + 1)))
    rows.append(("Good", "plain", "raw", "kept", 1.0))
    rows.append(("Classifier", "plain", "raw", "auc", 0.9))
    return pd.DataFrame(rows, columns=[*ROW, "metric", "mean"]).assign(n=8)


def costs() -> pd.DataFrame:
    rows = [(*key, key[0] == "Random map", 0.01 * k + 0.01) for k, key in enumerate(VALUES)]
    return pd.DataFrame(rows, columns=["method", "views", "control", "seconds"])


def test_plots_are_pictures() -> None:
    drawn = plots(long(), costs())
    assert set(drawn) == {"iou", "precision_recall", "quality_time"}
    for content in drawn.values():
        picture = np.asarray(Image.open(BytesIO(content)).convert("L"))
        assert picture.shape == (550, 880)
        assert picture.std() > 5


def test_a_table_without_operating_points_has_no_such_plot() -> None:
    table = long()
    old = table[~table["metric"].str.match("precision|recall")]
    assert set(plots(old, costs())) == {"iou", "quality_time"}


def test_curves_leave_out_rows_of_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[pd.DataFrame] = []
    monkeypatch.setattr(figures, "lines", lambda best, *rest: drawn.append(best) or Figure())
    table = long()
    plots(table, costs())
    plots(table.assign(n=[2 if views == "views" else 8 for views in table["views"]]), costs())
    assert [best.index[0] for best in drawn[::2]] == [
        ("Good", "views", "raw"),
        ("Good", "plain", "raw"),
    ]


def best() -> pd.DataFrame:
    means = long().pivot_table("mean", ROW, "metric", sort=False)
    return means.loc[[("Good", "views", "raw"), ("Random map", "plain", "raw")]]


def test_the_best_row_of_each_method_is_drawn() -> None:
    (axes,) = lines(best(), {"Random map"}, "iou", "percentile of the map", "IoU").axes
    good, control = axes.lines
    assert good.get_label() == "Good (views, raw)"
    assert list(good.get_xdata()) == list(PERCENTILES)
    assert list(good.get_ydata()) == pytest.approx([0.7 / (k + 1) for k in range(5)])
    assert control.get_color() == "0.6"


def test_many_methods_have_their_names_in_the_picture() -> None:
    one = best().iloc[:1].reset_index()
    many = pd.concat([one.assign(method=f"Method {k}") for k in range(50)]).set_index(ROW)
    figure = lines(many, set(), "iou", "percentile of the map", "IoU")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    names = axes.get_legend()
    assert names is not None
    assert len(names.get_texts()) == len(axes.lines) == 50
    low, high = (corner[1] for corner in names.get_window_extent().get_points())
    assert 0 <= low < high <= figure.bbox.height


def test_precision_is_drawn_against_recall() -> None:
    (axes,) = lines(best(), set(), "precision", "recall", "precision").axes
    assert list(axes.lines[0].get_xdata()) == pytest.approx([1 / (k + 1) for k in range(5)])
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.7] * 5)


def test_quality_stands_over_its_seconds() -> None:
    means = long().pivot_table("mean", ROW, "metric", sort=False)
    means = means[means["average_precision"].notna()].assign(n=[8, 2, 8])
    (axes,) = quality_time(means, costs(), {"Random map"}).axes
    filled = {tuple(c.get_offsets()[0]): len(c.get_facecolor()) for c in axes.collections}
    assert filled == {(0.01, 0.5): 1, (0.02, 0.7): 0, (0.03, 0.1): 1}  # hollow: on fewer images
    assert axes.get_xscale() == "log"
