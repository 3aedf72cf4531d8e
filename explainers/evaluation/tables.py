"""Tables of a comparison, made from its scores per image alone."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from explainers.evaluation.classification import auc_interval, classifier_rows, scored_classes
from explainers.evaluation.metrics.localisation import PERCENTILES, score_names
from explainers.evaluation.statistics import (
    ROW,
    Interval,
    Row,
    compare_to,
    summarise,
)

HEADS = {
    "average_precision": "average precision",
    "iou_95": "IoU at 95",
    "iou_chosen": "IoU at its own percentile",
    "total_auc": "total AUC",
    "partial_auc": "partial AUC",
    "average_precision_correct": "AP, correctly classified",
}

COMPARED = ["average_precision", "iou_chosen", "iou_95", "total_auc"]  # by `differences`


def long_table(scores: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Mean, interval and n of every score; those of correctly classified images end in _correct.

    Args:
        scores: Per image; see `statistics.checked_scores`.
        images: Per image: id, group, label, decision, correct, p(class) of each; column seed
            where scores have it.

    Returns:
        Columns method, views, smoothing, metric, mean, low, high, n; the method "Classifier" has
        its accuracy and the AUC of each class.
    """
    probability = scores["metric"].str.match(r"p_\w+\(")
    generated = decision_rows(scores[probability], images)
    scores = scores[~probability]
    key = [column for column in ("id", "seed") if column in images and column in scores]
    correct = scores.merge(images.loc[images["correct"], key], on=key)
    correct = correct[correct["metric"].isin(score_names(PERCENTILES))]
    correct = correct.assign(metric=correct["metric"] + "_correct")
    parts = [summarise(part) for part in (scores, correct) if len(part)]
    parts += [part for part in (generated, classifier_rows(images)) if len(part)]
    return pd.concat(parts, ignore_index=True)


def decision_rows(probabilities: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """ROC AUC of f(x_s) and 1 - f(x_a) against the decisions on x (arXiv:2012.07332, Table IV).

    Args:
        probabilities: Scores per image whose metrics are p_similar(class), p_adversarial(class).
        images: Of `long_table`.
    """
    key = [column for column in ("id", "seed") if column in images and column in probabilities]
    decided = images[[*key, "group", "decision"]].rename(columns={"decision": "label"})
    names, lines = scored_classes(images), []
    for name in names:
        for kind in ("similar", "adversarial"):
            chosen = probabilities[probabilities["metric"] == f"p_{kind}({name})"]
            for method, part in chosen.groupby("method", sort=False):
                part = part.rename(columns={"value": f"p({name})"}).drop(columns="group")
                auc = auc_interval(part.merge(decided, on=key), name)
                if kind == "adversarial":
                    auc = Interval(1 - auc.mean, 1 - auc.high, 1 - auc.low, auc.n)
                metric = f"auc_{kind}" + (f"_{name}" if len(names) > 1 else "")
                lines.append((method, "plain", "raw", metric, *auc))
    return pd.DataFrame(lines, columns=[*ROW, "metric", *Interval._fields])


def best_row(scores: pd.DataFrame, methods: Sequence[str]) -> Row | None:
    """The row of these methods with the highest mean average precision; None without any."""
    chosen = scores[scores["method"].isin(list(methods))]
    chosen = chosen[chosen["metric"] == "average_precision"]
    if chosen.empty:
        return None
    means = chosen.groupby(ROW, sort=False)["value"].mean().reset_index()
    best = means.sort_values("value", kind="stable").iloc[-1]
    return Row(*(str(best[name]) for name in ROW))


def differences(
    scores: pd.DataFrame, costs: pd.DataFrame, reference: str | None = None
) -> pd.DataFrame:
    """Paired differences of every row to the best row of the controls and that of a reference.

    The best is that of the highest mean average precision.

    Args:
        scores: Per image; see `statistics.checked_scores`.
        costs: Columns method and control.
        reference: Method whose best row the others are held against.

    Returns:
        Long form of each metric of `COMPARED`: against ("best control" or "reference"), row (the
        one held against), method, views, smoothing, metric, mean, low, high, n.

    Raises:
        ValueError: If no such method was scored.
    """
    controls = costs.loc[costs["control"], "method"].unique().tolist()
    held = {"best control": best_row(scores, controls)}
    if reference is not None:
        held["reference"] = best_row(scores, [reference])
        if held["reference"] is None:
            raise ValueError(
                f"reference {reference!r} is none of {scores['method'].unique().tolist()}."
            )
    parts = [
        compare_to(scores, metric, row).assign(against=against, row=", ".join(row))
        for against, row in held.items()
        for metric in COMPARED
        if row is not None and (scores["metric"] == metric).any()
    ]
    columns = ["against", "row", *ROW, "metric", *Interval._fields]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def wide_table(table: pd.DataFrame, paired: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """One line per method, views and smoothing: means with 95 % intervals as text, and costs.

    Args:
        table: Of `long_table`.
        paired: Of `differences`; those in average precision are shown.
        costs: Columns method, views, control, sigma, percentile_raw, percentile_smoothed, seconds
            (per image), megabytes.
    """
    localised = table[table["metric"].isin(list(HEADS))]
    cells = pd.Series([interval_text(line) for line in localised.itertuples()], localised.index)
    cells.index = pd.MultiIndex.from_frame(localised[[*ROW, "metric"]])
    wide = cells.unstack("metric", sort=False).reindex(columns=list(HEADS)).rename(columns=HEADS)
    counted = localised[localised["metric"] == "average_precision"]
    wide["images"] = counted.set_index(ROW)["n"]
    shown = paired[paired["metric"] == "average_precision"]
    for (against, row), part in shown.groupby(["against", "row"], sort=False):
        text = pd.Series([interval_text(line, "+") for line in part.itertuples()], dtype=str)
        text.index = pd.MultiIndex.from_frame(part[ROW])
        wide[f"AP minus {against} ({row})"] = text
    numbers = ["sigma", "percentile_raw", "percentile_smoothed", "seconds", "megabytes"]
    known = costs.reindex(columns=["method", "views", *numbers])  # older ones have no percentiles
    cost = known.groupby(["method", "views"]).mean()
    keys = wide.index.to_frame()
    lines = [cost.loc[key] for key in zip(keys["method"], keys["views"], strict=True)]
    used = (keys["smoothing"] == "smoothed").tolist()
    wide["sigma"] = [f"{line.sigma * u:.3g}" for line, u in zip(lines, used, strict=True)]
    chosen = [
        line[f"percentile_{form}"] for line, form in zip(lines, keys["smoothing"], strict=True)
    ]
    wide["percentile"] = ["" if one != one else f"{one:.3g}" for one in chosen]
    wide["s / image"] = [f"{line.seconds:.4f}" for line in lines]
    wide["MB"] = [f"{line.megabytes:.0f}" for line in lines]
    return wide.reset_index().fillna("")


def generated_table(table: pd.DataFrame) -> pd.DataFrame:
    """Share kept and flipped, overall and per decided class, their AUC, SSIM and PSNR of pairs."""
    chosen = table[
        table["metric"].str.match("kept|flipped|auc_|ssim|psnr") & (table["method"] != "Classifier")
    ]
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
