"""Tables III to XI: the published values and one's own beside them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from explainers.evaluation.published import CAPTIONS, paper_cells, paper_page

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def cells() -> pd.DataFrame:
    """A comparison with Gradient alone, raw and smoothed, and boxes."""
    columns = ["method", "views", "smoothing", "metric", "mean", "low", "high", "n"]
    rows = [
        ("Gradient", "plain", "raw", "iou_95", 0.25, 0.2, 0.3, 7),
        ("Gradient", "plain", "smoothed", "iou_95", 0.75, 0.7, 0.8, 7),
        ("Gradient", "views", "raw", "total_auc", 0.5, 0.4, 0.6, 7),
    ]
    costs = pd.DataFrame(
        [("Gradient", "plain", 0.5, 0), ("Gradient", "plain", 1.5, 1)],
        columns=["method", "views", "seconds", "seed"],
    )
    sides = pd.DataFrame(
        {"count": 2, "min": 10.0, "max": 30.0, "mean": 20.0, "median": 20.0},
        index=["height", "width", "area", "union"],
    )
    return paper_cells(pd.DataFrame(rows, columns=columns), costs, sides)


def test_published_values(cells: pd.DataFrame) -> None:
    """Of each table one value read off the paper; the number of its cells counted by hand."""
    known = {
        "III": ("mean", "", "height", "71.8", 12),
        "IV": ("Duo (W, TV)", "plain", "auc_adversarial", "0.958", 15),
        "V": ("Single_1 (W, TV)", "plain", "psnr_xs_xa", "54.55", 44),
        "VI": ("Single_2 (W)", "views", "iou_90", "0.268", 70),
        "VII": ("Single_1 (W)", "plain", "partial_auc", "0.220", 24),
        "VIII": ("Mask generator", "plain", "iou_98", "0.103", 55),
        "IX": ("BBMP", "plain", "seconds", "17.14", 27),
        "X": ("Mask generator", "views", "iou_95", "0.221", 55),
        "XI": ("Grad-CAM, last layer", "views", "total_auc", "0.397", 33),
    }
    assert list(known) == list(CAPTIONS)
    for table, (method, views, metric, value, count) in known.items():
        part = cells[cells["table"] == table]
        assert len(part) == count
        cell = part.set_index(["method", "views", "metric"])["published"]
        assert cell[method, views, metric] == value


def test_tables_of_the_paper_agree_with_each_other(cells: pd.DataFrame) -> None:
    """What is printed twice is the same, but for Grad-CAM's total AUC."""
    values = cells.groupby(["method", "views", "metric"])["published"].unique()
    twice = values[values.map(len) > 1]
    assert list(twice.index) == [("Grad-CAM, last layer", "plain", "total_auc")]
    assert list(twice.iloc[0]) == ["0.324", "0.326"]


def test_own_values_are_those_of_raw_maps(cells: pd.DataFrame) -> None:
    rows = cells.set_index(["table", "method", "views", "metric"])
    assert rows.loc[("VIII", "Gradient", "plain", "iou_95"), "mean"] == 0.25
    assert rows.loc[("X", "Gradient", "plain", "iou_95"), "high"] == 0.3
    assert rows.loc[("XI", "Gradient", "views", "total_auc"), "n"] == 7
    assert rows.loc[("IX", "Gradient", "plain", "seconds"), "mean"] == 1.0  # mean over seeds
    assert rows.loc[("III", "max", "", "width"), "mean"] == 30
    assert rows["mean"].notna().sum() == 2 + 1 + 2 + 12


def test_page(cells: pd.DataFrame) -> None:
    page = paper_page(cells).splitlines()
    assert (
        "| Gradient | plain | - / 0.203 | - / 0.199 | - / 0.187 | 0.250 / 0.152 | - / 0.097 |"
        in page
    )
    assert "| Gradient | views | 0.500 / 0.374 | - / 0.274 | - / 2.83 |" in page
    assert "| min |  | 10.0 / 13 | 10.0 / 13 | 10.0 / 0.5 |" in page
    assert [line.split()[2][:-1] for line in page if line.startswith("## ")] == list(CAPTIONS)


@pytest.mark.parametrize("preset", ["phantom/compare_all", "busi/compare_all", "rsna/compare"])
def test_the_presets_name_every_row(preset: str, cells: pd.DataFrame) -> None:
    given = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text())
    published = cells.loc[cells["table"] != "III", "method"]
    assert set(published) <= {*given["explainers"], *given["methods"]}
