"""Any score of any group of images: by class, correctness, confidence or a column of the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from explainers.evaluation.statistics import (
    ROW,
    Interval,
    Row,
    bootstrap_interval,
    resampled_weights,
)

CONFIDENCE = "confidence"
MOST_LEVELS = 10  # a column of more numbers than that is cut into quarters
KEY = [*ROW, "column", "level"]


def levels(images: pd.DataFrame, column: str) -> pd.Series:
    """The group of every image as text: values of a column, or quarters of its numbers.

    Args:
        images: Per image: id, label, decision, correct, p(class) of each, table columns.
        column: Any of them, or "confidence": the probability of the decided class.

    Raises:
        ValueError: If there is no such column.
    """
    if column in images:
        values = images[column]
    elif column == CONFIDENCE:
        values = confidences(images)
    else:
        raise ValueError(f"there is no column {column!r}, only {[CONFIDENCE, *images]}.")
    numbers = pd.to_numeric(values, errors="coerce")
    known = values.astype(str) != ""
    if values.nunique() > MOST_LEVELS and numbers[known].notna().all():
        values = pd.qcut(numbers, 4, duplicates="drop")
    return values.astype(str)


def confidences(images: pd.DataFrame) -> pd.Series:
    """Probability of the decided class of every image."""
    lines = images.to_dict("records")
    return pd.Series([line[f"p({line['decision']})"] for line in lines], images.index)


def per_case(
    scores: pd.DataFrame, images: pd.DataFrame, column: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores and images in which each case, of one or several images, is one line.

    A score is the mean over the images of the case that have it, and so is the confidence; what
    differs between the images of a case is "mixed".

    Args:
        scores: See `statistics.checked_scores`.
        images: Of `levels`, with seed where the scores have it.
        column: That names the case of each image; "" is a case of its own.

    Raises:
        ValueError: If there is no such column.
    """
    if column not in images:
        raise ValueError(f"there is no column {column!r}, only {[*images]}.")
    seed = [name for name in ("seed",) if name in images and name in scores]
    case = images[column].astype(str).where(images[column] != "", "image " + images["id"])
    told = images.assign(case=case, **{CONFIDENCE: confidences(images)})
    parts = [part.assign(**same(part)) for _, part in told.groupby([*seed, "case"], sort=False)]
    cases = pd.concat([part.iloc[:1] for part in parts])
    cases = cases.assign(id=cases["case"]).drop(columns="case")
    joined = scores.merge(told[["id", *seed, "case"]], on=["id", *seed])
    key = ["case", "group", *seed, *ROW, "metric"]
    means = joined.groupby(key, sort=False)["value"].mean().reset_index()
    return means.rename(columns={"case": "id"}), cases


def same(images: pd.DataFrame) -> dict[str, Any]:
    """The value of every column that all these images share, else "mixed"; mean confidence."""
    shared = {
        str(name): values.iloc[0] if values.nunique() == 1 else "mixed"
        for name, values in images.astype(object).items()
    }
    return {**shared, CONFIDENCE: images[CONFIDENCE].mean()}


def by_group(
    scores: pd.DataFrame, images: pd.DataFrame, columns: Sequence[str], metric: str
) -> pd.DataFrame:
    """Mean of a score in every group, and how far it lies from that of the other images.

    Args:
        scores: Per image; see `statistics.checked_scores`. Of several seeds each counts as an
            image's own line, and their images are drawn together.
        images: Of `levels`, with seed where the scores have it.
        columns: To group by.
        metric: Score, larger = better agreement.

    Returns:
        One line per row, column and level, of the images that have the score: mean, low, high, n
        (values), images, and difference with its bounds. The bounds of the differences hold
        together: of m differences of a row each interval leaves out 5 % / m (Bonferroni).

    Raises:
        ValueError: If there is no such score or column.
    """
    chosen = scores[scores["metric"] == metric].dropna(subset="value")
    if chosen.empty:
        raise ValueError(f"no score {metric!r}; there are {sorted(scores['metric'].unique())}.")
    key = [name for name in ("id", "seed") if name in images and name in scores]
    told = images[key].assign(**{f"level {name}": levels(images, name) for name in columns})
    parts = []
    for row, part in chosen.merge(told, on=key).groupby(ROW, sort=False):
        pairs = [
            (name, level)
            for name in columns
            for level in sorted(part[f"level {name}"].unique())
            if part[f"level {name}"].nunique() > 1
        ]
        for name, level in pairs:
            inside = part[f"level {name}"] == level
            mean = bootstrap_interval(part.loc[inside, "value"], part.loc[inside, "group"])
            clusters = part["group"].where(part["group"] != "", "image " + part["id"])
            rest = difference(part["value"], inside, clusters, 1 - 0.05 / len(pairs))
            count = part.loc[inside, "id"].nunique()
            parts.append((*row, name, level, *mean, count, *rest[:3]))
    bounds = ["difference", "difference low", "difference high"]
    return pd.DataFrame(parts, columns=[*KEY, *Interval._fields, "images", *bounds])


def difference(
    values: ArrayLike,
    inside: ArrayLike,
    clusters: ArrayLike,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean inside a group minus mean outside it, with a bootstrap interval over clusters.

    Args:
        values: One per image, finite.
        inside: Whether the image is in the group.
        clusters: Patient of each image: all of a patient's images are drawn together.
        level: Share of the resampled differences inside the interval.
        samples: Number of resamples; those that miss one of the two sides are left out.
        seed: Of the draws.
    """
    value, member = np.asarray(values, float), np.asarray(inside, bool)
    weights = resampled_weights(clusters, samples, seed)
    with np.errstate(invalid="ignore"):
        means = [weights @ (value * side) / (weights @ side) for side in (member, ~member)]
    low, high = np.nanquantile(means[0] - means[1], [(1 - level) / 2, (1 + level) / 2])
    mean = value[member].mean() - value[~member].mean()
    return Interval(float(mean), float(low), float(high), int(member.sum()))


def extremes(scores: pd.DataFrame, row: Row, metric: str, count: int) -> dict[str, float]:
    """Ids and scores of the images of the highest, then of the lowest agreement.

    Of several seeds the mean; an image comes once where there are fewer than twice the count.
    """
    wanted = (scores[ROW] == list(row)).all(axis=1) & (scores["metric"] == metric)
    means = scores[wanted].groupby("id")["value"].mean().sort_values(ascending=False)
    return {str(k): float(v) for k, v in {**means.head(count), **means.tail(count)}.items()}
