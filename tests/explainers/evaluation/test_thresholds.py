"""Thresholds chosen on validation, by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from explainers.evaluation.metrics.scaling import min_max, set_range, set_wide
from explainers.evaluation.thresholds import (
    UNION,
    Sweep,
    best_thresholds,
    breakdown,
    summary,
    write,
)


def test_scalings_of_a_split() -> None:
    maps, image = torch.rand(3, 16, 16) * 5, torch.rand(3, 1, 16, 16)
    sweep = Sweep(tile=0.5)
    assert_close(sweep.scaled(maps, image, "map"), min_max(maps))
    assert_close(sweep.scaled(maps, image, "set"), set_wide(maps, set_range([maps])))
    tile = sweep.scaled(maps, image, "tiles")
    assert_close(tile[:, :8, 8:], min_max(maps[:, :8, 8:]))
    assert sweep.scaled(maps, image, "superpixels").amax() == 1


def test_scores_by_hand() -> None:
    """A map whose upper half is the feature; the other image lacks it."""
    maps = torch.zeros(2, 4, 4)
    maps[:, :2] = 1
    feature = maps > 0
    feature[1] = False
    masks = {"network": feature, UNION: torch.ones(2, 4, 4).bool()}
    sweep = Sweep(("map",), (0.0, 0.5))
    rows = sweep.scores({"method": "m", "split": "val"}, ["a", "b"], maps, maps[:, None], masks)
    table = pd.DataFrame(rows).set_index(["feature", "threshold", "id"])
    assert set(table.loc["network"].index.get_level_values("id")) == {"a"}
    assert table.loc[("network", 0.5, "a"), "jaccard"] == 1
    assert table.loc[("network", 0.0, "a"), "jaccard"] == 0.5
    assert table.loc[(UNION, 0.5, "b"), "dice"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("wrong", [(), (0.5, 1.2)])
def test_impossible_thresholds_are_refused(wrong: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"thresholds must be in \[0, 1\]"):
        Sweep(thresholds=wrong)


@pytest.fixture
def scores() -> pd.DataFrame:
    """Validation likes 0.2, the test images 0.4."""
    values = {
        ("val", 0.2): [0.5, 0.7],
        ("val", 0.4): [0.4, 0.4],
        ("test", 0.2): [0.1, 0.3, 0.8],
        ("test", 0.4): [0.9, 0.9, 0.9],
    }
    rows = [
        {
            "id": f"{split}{k}",
            "group": "",
            "method": "Grad-CAM",
            "split": split,
            "scaling": "map",
            "feature": UNION,
            "threshold": threshold,
            "jaccard": value,
            "dice": value / 2,
            "label": "ill",
            "correct": k > 0,
        }
        for (split, threshold), found in values.items()
        for k, value in enumerate(found)
    ]
    return pd.DataFrame(rows)


def test_the_threshold_is_chosen_on_validation_alone(scores: pd.DataFrame) -> None:
    (best,) = best_thresholds(scores, "jaccard").to_dict("records")
    assert best["threshold"] == 0.2
    assert best["validation"] == pytest.approx(0.6)
    assert best["mean"] == pytest.approx(0.4)
    assert (best["min"], best["max"], best["n"]) == (0.1, 0.8, 3)


def test_breakdown_by_class_and_correctness(scores: pd.DataFrame) -> None:
    best = best_thresholds(scores, "jaccard")
    table = breakdown(scores, best, "jaccard").set_index(["label", "correct"])
    assert table.loc[("ill", False), "mean"] == pytest.approx(0.1)
    assert table.loc[("ill", True), "mean"] == pytest.approx(0.55)
    assert table.loc[("ill", True), "n"] == 2


def test_a_feature_without_validation_images_is_named(scores: pd.DataFrame) -> None:
    other = scores[scores["split"] == "test"].assign(feature="streaks")
    with pytest.raises(ValueError, match=r"none of them has \['streaks'\]"):
        best_thresholds(pd.concat([scores, other]), "jaccard")


def test_files(scores: pd.DataFrame, tmp_path: Path) -> None:
    write(scores, "jaccard", tmp_path / "made")
    table = pd.read_csv(tmp_path / "made" / "thresholds.csv")
    row = table.query("threshold == 0.4 and metric == 'dice'").iloc[0]
    assert row["mean"] == pytest.approx(0.45)
    expected = summary(scores[scores["split"] == "test"], "dice", ["method", "threshold"])
    assert expected["max"].tolist() == [0.4, 0.45]
    assert (tmp_path / "made" / "thresholds_map.png").read_bytes().startswith(b"\x89PNG")
    assert "| Grad-CAM | map | union | 0.2 |" in (tmp_path / "made" / "thresholds.md").read_text()
