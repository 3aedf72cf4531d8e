"""Tables of a comparison, made from its scores per image alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from explainers.evaluation.statistics import (
    ROW,
    Interval,
    Row,
    bootstrap_interval,
    compare_to,
    summarise,
)

HEADS = {
    "average_precision": "average precision",
    "iou_95": "IoU at 95",
    "total_auc": "total AUC",
    "partial_auc": "partial AUC",
}


def long_table(scores: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Mean, interval and n of every score; those of correctly classified images end in _correct.

    Args:
        scores: Per image; see `statistics.checked_scores`.
        images: Per image: id, group, label, correct, p_<class>; column seed where scores have it.

    Returns:
        Columns method, views, smoothing, metric, mean, low, high, n; the method "Classifier" has
        its accuracy and the AUC of each class.
    """
    key = [column for column in ("id", "seed") if column in images and column in scores]
    correct = scores.merge(images.loc[images["correct"], key], on=key)
    correct = correct[correct["metric"].isin([*HEADS, "iou_80", "iou_85", "iou_90", "iou_98"])]
    correct = correct.assign(metric=correct["metric"] + "_correct")
    parts = [summarise(part) for part in (scores, correct) if len(part)]
    return pd.concat([*parts, classifier_rows(images)], ignore_index=True)


def classifier_rows(images: pd.DataFrame) -> pd.DataFrame:
    """Accuracy, and the AUC of each class (the last one alone of two), with intervals."""
    names = [str(c).removeprefix("p_") for c in images.columns if str(c).startswith("p_")]
    rows: dict[str, Interval] = {}
    accuracy = images.groupby("id", sort=False)["correct"].mean()
    rows["accuracy"] = bootstrap_interval(accuracy, groups_of(images, accuracy.index))
    for name in names[1:] if len(names) == 2 else names:
        rows["auc" if len(names) == 2 else f"auc_{name}"] = auc_interval(images, name)
    lines = [("Classifier", "plain", "raw", metric, *value) for metric, value in rows.items()]
    return pd.DataFrame(lines, columns=[*ROW, "metric", *Interval._fields])


def groups_of(images: pd.DataFrame, ids: pd.Index) -> pd.Series:
    """The group of each image."""
    return images.drop_duplicates("id").set_index("id")["group"].reindex(ids)


def auc_interval(images: pd.DataFrame, name: str, samples: int = 2000, seed: int = 0) -> Interval:
    """ROC AUC of one class against the rest, bootstrapped over groups of images.

    The Mann-Whitney form: share of (positive, negative) pairs in the right order, ties half; of
    several seeds the mean of their AUCs.
    """
    trained = images if "seed" in images else images.assign(seed=0)
    wide = trained.pivot(index="id", columns="seed", values=f"p_{name}")
    first = images.drop_duplicates("id").set_index("id").loc[wide.index]
    positive = (first["label"] == name).to_numpy()
    if positive.all() or not positive.any():
        return Interval(np.nan, np.nan, np.nan, len(wide))
    score = wide.to_numpy().T
    above = score[:, positive, None] - score[:, None, ~positive]
    pairs = ((np.sign(above) + 1) / 2).mean(0)
    names = first["group"].where(first["group"] != "", "image " + first.index.astype(str))
    codes, groups = pd.factorize(names)
    share = np.full(len(groups), 1 / len(groups))
    draws = np.random.default_rng(seed).multinomial(len(groups), share, size=samples)[:, codes]
    one, two = draws[:, positive].astype(float), draws[:, ~positive].astype(float)
    weight = one.sum(1) * two.sum(1)
    values = ((one @ pairs) * two).sum(1)[weight > 0] / weight[weight > 0]
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(pairs.mean()), float(low), float(high), len(wide))


def best_control(scores: pd.DataFrame, controls: Sequence[str]) -> Row | None:
    """The control row with the highest mean average precision; None without controls."""
    chosen = scores[scores["method"].isin(list(controls))]
    chosen = chosen[chosen["metric"] == "average_precision"]
    if chosen.empty:
        return None
    means = chosen.groupby(ROW, sort=False)["value"].mean().reset_index()
    best = means.sort_values("value", kind="stable").iloc[-1]
    return Row(*(str(best[name]) for name in ROW))


def wide_table(table: pd.DataFrame, scores: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """One line per method, views and smoothing: means with 95 % intervals as text, and costs.

    Args:
        table: Of `long_table`.
        scores: Per image, for the paired difference to the best control.
        costs: Columns method, views, control, sigma, seconds (per image), megabytes.
    """
    localised = table[table["metric"].isin(list(HEADS))]
    cells = pd.Series([interval_text(line) for line in localised.itertuples()], localised.index)
    cells.index = pd.MultiIndex.from_frame(localised[[*ROW, "metric"]])
    wide = cells.unstack("metric", sort=False).reindex(columns=list(HEADS)).rename(columns=HEADS)
    reference = best_control(scores, costs.loc[costs["control"], "method"].unique().tolist())
    if reference is not None:
        paired = compare_to(scores, "average_precision", reference)
        text = pd.Series([interval_text(line, "+") for line in paired.itertuples()], dtype=str)
        text.index = pd.MultiIndex.from_frame(paired[ROW])
        wide["AP minus best control (" + ", ".join(reference) + ")"] = text
    cost = costs.groupby(["method", "views"])[["sigma", "seconds", "megabytes"]].mean()
    keys = wide.index.to_frame()
    lines = [cost.loc[key] for key in zip(keys["method"], keys["views"], strict=True)]
    used = (keys["smoothing"] == "smoothed").tolist()
    wide["sigma"] = [f"{line.sigma * u:.3g}" for line, u in zip(lines, used, strict=True)]
    wide["s / image"] = [f"{line.seconds:.4f}" for line in lines]
    wide["MB"] = [f"{line.megabytes:.0f}" for line in lines]
    return wide.reset_index().fillna("")


def generated_table(table: pd.DataFrame) -> pd.DataFrame:
    """Share kept and flipped, overall and per decided class, SSIM and PSNR of the three pairs."""
    chosen = table[table["metric"].str.match("kept|flipped|ssim|psnr")]
    cells = pd.Series([interval_text(line) for line in chosen.itertuples()], dtype=str)
    cells.index = pd.MultiIndex.from_frame(chosen[["metric", "method"]])
    return cells.unstack("method", sort=False).reset_index()


def classifier_table(table: pd.DataFrame) -> pd.DataFrame:
    """AUC and accuracy of the explained classifier."""
    chosen = table[table["method"] == "Classifier"]
    text = [interval_text(line) for line in chosen.itertuples()]
    return pd.DataFrame({"metric": chosen["metric"], "mean [95 % interval]": text})


def interval_text(line: object, sign: str = "") -> str:
    """A mean and its interval: "0.612 [0.580, 0.641]"."""
    mean, low, high = (getattr(line, name) for name in ("mean", "low", "high"))
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def markdown(table: pd.DataFrame) -> str:
    """A table of texts as Markdown."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
