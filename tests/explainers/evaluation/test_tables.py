from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

from explainers.evaluation.classification import (
    auc_interval,
    classifier_rows,
    decision_scores,
)
from explainers.evaluation.results import Results
from explainers.evaluation.statistics import Row
from explainers.evaluation.tables import (
    best_row,
    decision_rows,
    differences,
    generated_table,
    long_table,
    markdown,
    wide_table,
)


def images(n: int = 40, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    label = np.where(np.arange(n) % 2, "ill", "well")
    probability = np.round(rng.random(n) * 0.7 + 0.3 * (label == "ill"), 1)  # with ties
    return pd.DataFrame(
        {
            "id": [f"{k}" for k in range(n)],
            "group": "",
            "label": label,
            "decision": np.where(probability > 0.5, "ill", "well"),
            "correct": (probability > 0.5) == (label == "ill"),
            "p(well)": 1 - probability,
            "p(ill)": probability,
        }
    )


def scores(table: pd.DataFrame) -> pd.DataFrame:
    parts = []
    for method, value in (("Good", 0.8), ("Random map", 0.1), ("Centred Gaussian", 0.3)):
        part = pd.DataFrame({"id": table["id"], "group": "", "method": method})
        wave = 0.01 * np.arange(len(table)) / len(table)
        parts.append(part.assign(views="plain", smoothing="raw", value=value + wave))
    return pd.concat(parts, ignore_index=True).assign(metric="average_precision")


def costs() -> pd.DataFrame:
    names = ["Good", "Random map", "Centred Gaussian"]
    one = {"views": "plain", "sigma": 0.05, "seconds": 0.5, "megabytes": 7.0}
    return pd.DataFrame([{"method": name, "control": name != "Good", **one} for name in names])


def test_auc_is_that_of_scikit_learn() -> None:
    table = images()
    interval = auc_interval(table, "ill")
    assert interval.mean == pytest.approx(roc_auc_score(table["label"] == "ill", table["p(ill)"]))
    assert interval.low < interval.mean < interval.high
    assert interval.n == 40


def test_auc_interval_against_plain_resampling() -> None:
    table = images(60)
    rng, values = np.random.default_rng(1), []
    for _ in range(500):
        part = table.iloc[rng.integers(60, size=60)]
        values.append(roc_auc_score(part["label"] == "ill", part["p(ill)"]))
    low, high = np.quantile(values, [0.025, 0.975])
    interval = auc_interval(table, "ill")
    assert interval.low == pytest.approx(low, abs=0.03)
    assert interval.high == pytest.approx(high, abs=0.03)


def test_auc_draws_whole_groups() -> None:
    """Copies of every image in its group leave the interval as it is without them."""
    table = images(30)
    copies = pd.concat([table.assign(id=table["id"] + s, group=table["id"]) for s in "ab"])
    alone = table.assign(group=table["id"])
    assert auc_interval(copies, "ill")[1:3] == pytest.approx(
        auc_interval(alone, "ill")[1:3], abs=0.02
    )


def test_auc_of_seeds_is_their_mean() -> None:
    first, second = images(), images()
    second["p(ill)"] = 1 - second["p(ill)"]
    both = pd.concat([first.assign(seed=0), second.assign(seed=1)])
    assert auc_interval(both, "ill").mean == pytest.approx(0.5)


def test_auc_without_one_class_is_nan() -> None:
    table = images()
    assert np.isnan(auc_interval(table[table["label"] == "ill"], "ill").mean)


def test_classifier_rows_of_two_classes() -> None:
    rows = classifier_rows(images()).set_index("metric")
    table = images()
    assert rows.loc["accuracy", "mean"] == pytest.approx(table["correct"].mean())
    truth = precision_recall_fscore_support(
        table["label"], table["decision"], average=None, labels=["well", "ill"]
    )
    for metric, values in zip(("precision", "recall", "f1"), truth[:3], strict=True):
        assert rows.loc[f"{metric}_well", "mean"] == pytest.approx(values[0])
        assert rows.loc[f"{metric}_ill", "mean"] == pytest.approx(values[1])
        assert rows.loc[metric, "low"] < rows.loc[metric, "mean"] < rows.loc[metric, "high"]
    assert rows.loc["recall", "mean"] == pytest.approx(rows.loc["accuracy", "mean"])
    assert list(rows.index) == [
        "accuracy",
        *(f"{m}{c}" for m in ("precision", "recall", "f1") for c in ("", "_well", "_ill")),
        "auc",
    ]


def test_weighted_scores_are_scikit_learns() -> None:
    """Three classes, one of them never decided."""
    label, decision = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0]
    table = confusion_matrix(label, decision).astype(float)
    found = {k: v.item() for k, v in decision_scores(table[None], list("abc")).items()}
    expected = precision_recall_fscore_support(label, decision, average="weighted", zero_division=0)
    assert [found[m] for m in ("precision", "recall", "f1")] == pytest.approx(expected[:3])
    assert found["precision_c"] == found["f1_c"] == 0


def test_a_class_without_images_has_no_score() -> None:
    scores = decision_scores(np.array([[[3.0, 1.0], [0.0, 0.0]]]), ["well", "ill"])
    found = {name: value.item() for name, value in scores.items()}
    assert np.isnan([found[f"{m}_ill"] for m in ("precision", "recall", "f1")]).all()
    assert found["recall"] == found["accuracy"] == 0.75


def test_accuracy_interval_is_that_of_resampled_images() -> None:
    table = images(60)
    rng = np.random.default_rng(1)
    means = [table["correct"].iloc[rng.integers(60, size=60)].mean() for _ in range(2000)]
    row = classifier_rows(table).set_index("metric").loc["accuracy"]
    low, high = np.quantile(means, [0.025, 0.975])
    assert row["low"] == pytest.approx(low, abs=0.03)
    assert row["high"] == pytest.approx(high, abs=0.03)


def test_correct_rows_leave_out_the_wrong_images() -> None:
    table = images()
    long = long_table(scores(table), table).set_index(["method", "metric"])
    assert long.loc[("Good", "average_precision"), "n"] == 40
    assert long.loc[("Good", "average_precision_correct"), "n"] == table["correct"].sum()


def test_auc_of_generated_images_is_against_the_decisions() -> None:
    table = images()
    said = pd.concat(
        scores(table).query("method == 'Good'").assign(metric=f"p_{kind}({name})", value=values)
        for kind, score in (("similar", table["p(ill)"] ** 2), ("adversarial", table["p(well)"]))
        for name, values in (("ill", score), ("well", 1 - score))
    )
    long = long_table(pd.concat([scores(table), said]), table).set_index(["method", "metric"])
    similar, adversarial = (long.loc[("Good", name)] for name in ("auc_similar", "auc_adversarial"))
    truth = table["decision"] == "ill"
    assert similar["mean"] == pytest.approx(roc_auc_score(truth, table["p(ill)"]))
    assert adversarial["mean"] == pytest.approx(roc_auc_score(truth, 1 - table["p(well)"]))
    assert adversarial["low"] <= adversarial["mean"] <= adversarial["high"]
    assert set(generated_table(long.reset_index())["metric"]) == {"auc_similar", "auc_adversarial"}


def test_auc_of_decisions_follows_each_seeds_own() -> None:
    """The second seed decides the other way round and says the opposite of the first."""
    first = images()
    other = first["decision"].map({"ill": "well", "well": "ill"})
    both = pd.concat([first.assign(seed=0), first.assign(seed=1, decision=other)])
    said = pd.concat(
        scores(first)
        .query("method == 'Good'")
        .assign(metric="p_similar(ill)", value=value.to_numpy(), seed=seed)
        for seed, value in enumerate((first["p(ill)"], first["p(well)"]))
    )
    (row,) = decision_rows(said, both).itertuples()
    truth = first["decision"] == "ill"
    assert row.mean == pytest.approx(roc_auc_score(truth, first["p(ill)"]))


def test_a_column_that_begins_with_p_is_no_class() -> None:
    table = images().assign(p_id="7", patient="x")
    assert list(classifier_rows(table)["metric"]) == list(classifier_rows(images())["metric"])


def test_wide_table_holds_difference_to_the_best_row() -> None:
    table = images()
    values = scores(table)
    assert best_row(values, ["Random map", "Centred Gaussian"]) == Row("Centred Gaussian")
    long, paired = long_table(values, table), differences(values, costs())
    wide = wide_table(long, paired, costs()).set_index("method")
    column = "AP minus best control (Centred Gaussian, plain, raw)"
    assert wide.loc["Good", column] == "+0.500 [+0.500, +0.500]"
    assert wide.loc["Centred Gaussian", column] == ""
    assert wide.loc["Good", "images"] == len(table)
    assert wide.loc["Good", "AP, correctly classified"].startswith("0.80")
    assert wide.loc["Good", "s / image"] == "0.5000"
    assert wide.loc["Good", "sigma"] == "0"  # the raw row is not smoothed
    assert wide.loc["Good", "percentile"] == ""  # of a folder from before there was one
    chosen = costs().assign(percentile_raw=98.0, percentile_smoothed=90.0)
    assert wide_table(long, paired, chosen)["percentile"].tolist() == ["98"] * 3


def test_differences_are_to_the_best_control_and_to_the_reference() -> None:
    values = scores(images())
    iou = values.assign(metric="iou_chosen", value=values["value"] / 2)
    paired = differences(pd.concat([values, iou]), costs(), "Good")
    found = paired.set_index(["against", "row", "method", "metric"])["mean"].to_dict()
    control, good = "Centred Gaussian, plain, raw", "Good, plain, raw"
    metrics = ("average_precision", "iou_chosen")
    for metric, expected in zip(metrics, (0.5, 0.25), strict=True):
        assert found["best control", control, "Good", metric] == pytest.approx(expected)
    assert {key[:2] for key in found} == {("best control", control), ("reference", good)}
    assert {key[3] for key in found} == set(metrics)  # the others were not scored
    assert len(found) == 2 * 2 * 2
    with pytest.raises(ValueError, match="reference 'Grad-CAM' is none of"):
        differences(values, costs(), "Grad-CAM")


def test_without_controls_there_is_no_best_one() -> None:
    assert best_row(scores(images()), []) is None


def test_markdown_by_hand() -> None:
    table = pd.DataFrame({"a": ["x"], "b": ["1"]})
    assert markdown(table) == "| a | b |\n| --- | --- |\n| x | 1 |\n"


def test_results_come_back_as_written(tmp_path: Path) -> None:
    table, spent = images(), costs().assign(seconds=0.1 + 0.2)
    for name, part in (("scores", scores(table)), ("images", table), ("costs", spent)):
        part.to_csv(tmp_path / f"{name}.csv", index=False)
    read = Results.read(tmp_path)
    for found, expected in ((read.images, table), (read.costs, spent)):
        pd.testing.assert_frame_equal(found, expected, check_dtype=False, check_exact=True)
