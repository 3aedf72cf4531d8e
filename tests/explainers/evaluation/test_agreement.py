"""Scores by group of images, by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from explainers.evaluation.agreement import by_group, difference, extremes, levels, per_case
from explainers.evaluation.statistics import Row, bootstrap_interval

IMAGES = pd.DataFrame(
    {
        "id": ["a", "b", "c", "d"],
        "group": ["p", "p", "", ""],
        "label": ["ill", "ill", "well", "ill"],
        "decision": ["ill", "well", "well", "ill"],
        "correct": [True, False, True, True],
        "p(well)": [0.1, 0.7, 0.6, 0.4],
        "p(ill)": [0.9, 0.3, 0.4, 0.6],
        "skin": ["I", "VI", "I", ""],
    }
)


def scores(values: dict[str, float], metric: str = "average_precision") -> pd.DataFrame:
    groups = IMAGES.set_index("id")["group"]
    rows = [(i, groups[i], "Single", "plain", "raw", metric, v) for i, v in values.items()]
    columns = ["id", "group", "method", "views", "smoothing", "metric", "value"]
    return pd.DataFrame(rows, columns=columns)


SCORES = scores({"a": 0.9, "b": 0.1, "c": 0.4, "d": 0.6})


def test_levels_of_text_and_of_confidence() -> None:
    assert levels(IMAGES, "skin").tolist() == ["I", "VI", "I", ""]
    assert levels(IMAGES, "correct").tolist() == ["True", "False", "True", "True"]
    assert levels(IMAGES, "confidence").tolist() == ["0.9", "0.7", "0.6", "0.6"]
    with pytest.raises(ValueError, match="no column 'sex', only"):
        levels(IMAGES, "sex")


def test_many_numbers_are_cut_into_quarters() -> None:
    images = pd.DataFrame({"age": [str(year) for year in range(40)]})
    quarters = levels(images, "age")
    assert quarters.value_counts().tolist() == [10] * 4
    named = pd.DataFrame({"site": [f"hospital {k}" for k in range(40)]})
    assert levels(named, "site").nunique() == 40


def test_groups_by_hand() -> None:
    table = by_group(SCORES, IMAGES, ["label", "correct"], "average_precision")
    line = table.set_index(["column", "level"])
    assert line.loc[("label", "ill"), "mean"] == pytest.approx((0.9 + 0.1 + 0.6) / 3)
    assert line.loc[("label", "ill"), "images"] == 3
    assert line.loc[("label", "ill"), "difference"] == pytest.approx(1.6 / 3 - 0.4)
    assert line.loc[("correct", "False"), "difference"] == pytest.approx(0.1 - 1.9 / 3)
    own = bootstrap_interval([0.9, 0.1, 0.6], ["p", "p", ""])
    assert line.loc[("label", "ill"), ["low", "high"]].tolist() == [own.low, own.high]


def test_a_column_of_one_level_has_nothing_to_compare() -> None:
    one = IMAGES.assign(view="front")
    assert by_group(SCORES, one, ["view"], "average_precision").empty


def test_more_comparisons_widen_the_intervals_of_differences() -> None:
    rng = np.random.default_rng(0)
    names = [f"i{k}" for k in range(60)]
    images = pd.DataFrame({"id": names, "sex": ["f", "m"] * 30, "site": list("abcdef") * 10})
    table = pd.DataFrame(
        [
            (n, "", "Single", "plain", "raw", "dice", v)
            for n, v in zip(names, rng.random(60), strict=True)
        ],
        columns=SCORES.columns,
    )
    few = by_group(table, images, ["sex"], "dice").set_index(["column", "level"]).loc[("sex", "f")]
    many = (
        by_group(table, images, ["sex", "site"], "dice")
        .set_index(["column", "level"])
        .loc[("sex", "f")]
    )
    width = [line["difference high"] - line["difference low"] for line in (few, many)]
    assert width[0] < width[1]
    assert few["difference"] == many["difference"]


def test_several_seeds_are_matched_with_their_own_decisions() -> None:
    images = pd.concat([IMAGES.assign(seed=0), IMAGES.assign(seed=1, correct=False)])
    both = pd.concat([SCORES.assign(seed=0), SCORES.assign(seed=1)])
    line = by_group(both, images, ["correct"], "average_precision").set_index("level")
    assert line.loc["True", "mean"] == pytest.approx(1.9 / 3)
    assert line.loc["False", "mean"] == pytest.approx((0.1 + 2.0) / 5)
    assert line.loc["False", ["n", "images"]].tolist() == [5, 4]


def test_difference_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(1), 0
    for trial in range(100):
        inside = rng.random(60) < 0.4
        values = rng.normal(size=60) + 0.5 * inside
        low, high = difference(values, inside, np.arange(60), samples=400, seed=trial)[1:3]
        hits += low <= 0.5 <= high
    assert 87 <= hits <= 100


def test_patients_are_drawn_whole() -> None:
    """Ten equal images of each patient say no more than one."""
    rng = np.random.default_rng(0)
    values, inside = rng.random(20), np.arange(20) % 2 == 0
    one = difference(values, inside, np.arange(20))
    ten = difference(values.repeat(10), inside.repeat(10), np.arange(20).repeat(10))
    assert ten[:3] == pytest.approx(one[:3])


def test_extremes_from_the_highest_down() -> None:
    found = extremes(SCORES, Row("Single"), "average_precision", 1)
    assert found == {"a": 0.9, "b": 0.1}
    assert list(extremes(SCORES, Row("Single"), "average_precision", 9)) == ["a", "d", "c", "b"]
    assert extremes(SCORES, Row("Duo"), "average_precision", 1) == {}


def test_an_unknown_score_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"no score 'dice'; there are \['average_precision'\]"):
        by_group(SCORES, IMAGES, ["label"], "dice")


def test_each_case_counts_once() -> None:
    """a and b are one patient's: .9 and .1, one of them right; c and d are cases of their own."""
    values, images = per_case(SCORES, IMAGES, "group")
    assert images["id"].tolist() == ["p", "image c", "image d"]
    assert images["label"].tolist() == ["ill", "well", "ill"]
    assert images["correct"].tolist() == ["mixed", True, True]
    assert images["confidence"].tolist() == pytest.approx([0.8, 0.6, 0.6])
    assert values.set_index("id")["value"].to_dict() == pytest.approx(
        {"p": 0.5, "image c": 0.4, "image d": 0.6}
    )
    table = by_group(values, images, ["label", "confidence"], "average_precision")
    line = table.set_index(["column", "level"])
    assert line.loc[("label", "ill"), "mean"] == pytest.approx(0.55)
    assert line.loc[("label", "ill"), "images"] == 2
    two = [part.assign(seed=seed) for seed, part in enumerate((SCORES, SCORES))]
    seen = [part.assign(seed=seed) for seed, part in enumerate((IMAGES, IMAGES))]
    values, images = per_case(pd.concat(two), pd.concat(seen), "group")
    assert len(values) == len(images) == 6
    with pytest.raises(ValueError, match="no column 'case', only"):
        per_case(SCORES, IMAGES, "case")
