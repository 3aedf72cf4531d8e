"""Bootstrap intervals against scipy and values by hand; the table of scores per image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from explainers.evaluation.statistics import (
    COLUMNS,
    Interval,
    Row,
    bootstrap_interval,
    checked_scores,
    compare_to,
    paired_difference,
    read_scores,
    scores_csv,
    summarise,
)


def table(values: dict[str, list[float]], metric: str = "average_precision") -> pd.DataFrame:
    """Scores of several methods on the images "0", "1", ..."""
    rows = [
        (str(k), "", method, "plain", "raw", metric, value)
        for method, scores in values.items()
        for k, value in enumerate(scores)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def test_interval_by_hand() -> None:
    """Resamples of {0, 1} have means 0, 1/2, 1 with probability 1/4, 1/2, 1/4."""
    assert bootstrap_interval([0, 1]) == Interval(0.5, 0, 1, 2)
    assert bootstrap_interval([0, 1], level=0.4) == Interval(0.5, 0.5, 0.5, 2)


def test_groups_by_hand() -> None:
    """Drawing patients {0, 0} and {1} gives means 0, 1/3, 1 with probability 1/4, 1/2, 1/4."""
    groups = ["a", "a", "b"]
    assert bootstrap_interval([0, 0, 1], groups, level=0.4) == pytest.approx(
        Interval(1 / 3, 1 / 3, 1 / 3, 3)
    )
    assert bootstrap_interval([0, 0, 1], groups)[1:] == (0, 1, 3)


def test_an_image_without_group_is_a_group_of_its_own() -> None:
    values = np.random.default_rng(0).random(9)
    assert bootstrap_interval(values, [""] * 9) == bootstrap_interval(values)
    mixed = bootstrap_interval([0, 0, 1], ["a", "a", ""])
    assert mixed == bootstrap_interval([0, 0, 1], ["a", "a", "b"])


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.integers(20, 80))
def test_interval_agrees_with_scipy(seed: int, n: int) -> None:
    values = np.random.default_rng(seed).gamma(2.0, size=n)
    ours = bootstrap_interval(values, samples=50_000)
    theirs = bootstrap(
        (values,),
        np.mean,
        n_resamples=50_000,
        method="percentile",
        random_state=np.random.default_rng(1),
    )
    tolerance = 0.15 * theirs.standard_error
    interval = theirs.confidence_interval
    assert [ours.low, ours.high] == pytest.approx([interval.low, interval.high], abs=tolerance)
    assert ours.mean == pytest.approx(values.mean())


def test_unknown_and_infinite_values_are_left_out() -> None:
    known = [0.2, 0.4, 0.9]
    assert bootstrap_interval([np.nan, *known, np.inf]) == bootstrap_interval(known)
    groups = ["x", "a", "a", "b", "b"]
    left = bootstrap_interval([np.nan, *known, np.nan], groups)
    assert left == bootstrap_interval(known, groups[1:4])


def test_too_few_values_have_no_bounds() -> None:
    nan = float("nan")
    assert bootstrap_interval([0.3]) == pytest.approx(Interval(0.3, nan, nan, 1), nan_ok=True)
    one_patient = bootstrap_interval([0.2, 0.4], ["a", "a"])
    assert one_patient == pytest.approx(Interval(0.3, nan, nan, 2), nan_ok=True)
    none = Interval(nan, nan, nan, 0)
    assert bootstrap_interval([nan, nan]) == pytest.approx(none, nan_ok=True)
    assert bootstrap_interval([]) == pytest.approx(none, nan_ok=True)


def test_paired_difference_is_narrower_than_its_parts() -> None:
    """The same shift on every image is certain, however much the images differ."""
    second = np.random.default_rng(0).random(30)
    assert paired_difference(second + 0.1, second) == pytest.approx(Interval(0.1, 0.1, 0.1, 30))
    first = second.copy()
    first[0] = np.nan
    assert paired_difference(first, second) == Interval(0, 0, 0, 29)


def test_infinite_pairs_are_left_out() -> None:
    assert paired_difference([np.inf, 2, 3], [np.inf, 1, 2]) == Interval(1, 1, 1, 2)


def test_lengths_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\(2,\), \(3,\)"):
        paired_difference([0, 1], [0, 1, 2])
    with pytest.raises(ValueError, match="one name per value"):
        bootstrap_interval([0, 1], ["a"])


def test_scores_come_back_as_written(tmp_path: Path) -> None:
    scores = table({"Single, 10 views": [0.1 + 0.2, np.nan, np.inf], "NA": [1e-17, 1 / 3, -0.0]})
    scores["id"] = ["007", "NA", "x,y"] * 2
    scores["group"] = ["", "nan", "1.0"] * 2
    scores["seed"] = 3
    (tmp_path / "scores.csv").write_text(scores_csv(scores))
    pd.testing.assert_frame_equal(
        read_scores(tmp_path / "scores.csv"), scores, check_dtype=False, check_exact=True
    )


def test_a_wrong_table_is_refused() -> None:
    scores = table({"a": [0.1, 0.2]})
    with pytest.raises(ValueError, match=r"\['metric', 'value'\] are missing"):
        checked_scores(scores.drop(columns=["metric", "value"]))
    with pytest.raises(ValueError, match=r"'id': '0'.*column seed"):
        checked_scores(pd.concat([scores, scores]))


def test_summary_of_seeds_counts_images() -> None:
    """Per image the mean of its seeds, 0.2 and 0.4; then their mean over images."""
    seeds = [
        table({"a": values}).assign(seed=k) for k, values in enumerate([[0.1, 0.4], [0.3, 0.4]])
    ]
    (row,) = summarise(pd.concat(seeds)).to_dict("records")
    key = {"method": "a", "views": "plain", "smoothing": "raw", "metric": "average_precision"}
    numbers = {"mean": 0.3, "low": 0.2, "high": 0.4, "n": 2}
    assert {name: row.pop(name) for name in key} == key
    assert row == pytest.approx(numbers)


def test_summary_keeps_the_order_of_rows() -> None:
    scores = pd.concat([table({"b": [1, 2], "a": [3, 4]}), table({"b": [5]}, "iou_95")])
    summary = summarise(scores)
    assert summary["method"].tolist() == ["b", "a", "b"]
    assert summary["mean"].tolist() == [1.5, 3.5, 5]
    assert list(summary) == [*COLUMNS[2:6], *Interval._fields]


def test_compare_pairs_images_by_id() -> None:
    """Rows shuffled, one image missing: b is 0.1 under a on each of the two images they share."""
    scores = table({"a": [0.9, 0.5, 0.2], "b": [0.8, 0.4]}).sample(frac=1, random_state=0)
    (row,) = compare_to(scores, "average_precision", Row("a")).to_dict("records")
    assert row["method"] == "b"
    assert [row[name] for name in Interval._fields] == pytest.approx([-0.1, -0.1, -0.1, 2])


def test_compare_draws_whole_groups() -> None:
    scores = table({"a": [0.0, 0.0, 0.0], "b": [0.0, 0.0, 1.0]})
    scores["group"] = ["p", "p", "p"] * 2
    (row,) = compare_to(scores, "average_precision", Row("a")).to_dict("records")
    assert np.isnan(row["low"])
    assert row["mean"] == pytest.approx(1 / 3)


def test_compare_needs_the_reference() -> None:
    with pytest.raises(ValueError, match=r"no 'average_precision' of \('c', 'plain', 'raw'\)"):
        compare_to(table({"a": [1.0]}), "average_precision", Row("c"))
