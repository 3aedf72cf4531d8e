"""Scores per image, their bootstrap intervals, and paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

ROW = ["method", "views", "smoothing"]
COLUMNS = ["id", "group", *ROW, "metric", "value"]
KINDS = dict.fromkeys(["id", "group", *ROW, "metric"], str)


class Interval(NamedTuple):
    """A mean, the bounds of its bootstrap interval, and the number of images behind it."""

    mean: float
    low: float
    high: float
    n: int


class Row(NamedTuple):
    """A row of a table: the method, and the form of its maps.

    Attributes:
        method: Name.
        views: "plain", or "views" for the average over geometric views.
        smoothing: "raw", or "smoothed" with the method's own sigma.
    """

    method: str
    views: str = "plain"
    smoothing: str = "raw"


def checked_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """The scores themselves, or an error if they are not a table of scores per image.

    Args:
        scores: Long form with the columns id, group (patient; "" is a group of its own), method,
            views, smoothing, metric, value and, for a method trained several times, seed.

    Raises:
        ValueError: If a column is missing, or an image has two values for one score.
    """
    missing = [column for column in COLUMNS if column not in scores]
    if missing:
        raise ValueError(f"scores need the columns {COLUMNS}, but {missing} are missing.")
    key = [column for column in ["id", "seed", *ROW, "metric"] if column in scores]
    twice = scores[scores.duplicated(key)]
    if len(twice):
        raise ValueError(
            "scores must hold one value per image and score, but got two for "
            f"{twice[key].iloc[0].to_dict()}: keep one, or tell them apart in a column seed."
        )
    return scores


def scores_csv(scores: pd.DataFrame) -> str:
    """Scores per image as CSV, every digit kept and NaN left empty; see `checked_scores`."""
    return checked_scores(scores).to_csv(index=False)


def read_scores(path: Path) -> pd.DataFrame:
    """Read a file of `scores_csv`; ids and groups stay text ("007", "NA", "")."""
    scores = pd.read_csv(
        path,
        dtype=KINDS,
        keep_default_na=False,
        na_values={"value": [""]},
        float_precision="round_trip",
    )
    return checked_scores(scores)


def bootstrap_interval(
    values: ArrayLike,
    groups: ArrayLike | None = None,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean over images with its percentile bootstrap interval.

    Args:
        values: One per image; NaN and infinite values (PSNR of identical images) are left out.
        groups: One per image: whole groups (patients) are drawn; "" is a group of its own.
        samples: Number of resamples.
        seed: Of the draws, the same for every call with as many groups.
        level: Share of the resampled means inside the interval.

    Returns:
        NaN bounds with fewer than two groups; all NaN and n = 0 without a value.

    Raises:
        ValueError: If there are not as many groups as values.

    Source: Efron and Tibshirani 1993, Ch. 13.
    """
    value = np.asarray(values, float)
    known = np.isfinite(value)
    codes = _codes(len(value), groups)[known]
    value = value[known]
    if not len(value):
        return Interval(np.nan, np.nan, np.nan, 0)
    _, codes = np.unique(codes, return_inverse=True)
    total, count = np.bincount(codes, value), np.bincount(codes)
    if len(total) < 2:
        return Interval(float(value.mean()), np.nan, np.nan, len(value))
    draw = np.random.default_rng(seed).integers(len(total), size=(samples, len(total)))
    means = total[draw].sum(1) / count[draw].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value.mean()), float(low), float(high), len(value))


def intervals_by(scores: pd.DataFrame, key: Sequence[str], value: str = "value") -> pd.DataFrame:
    """Mean and bootstrap interval of every part, in order of appearance.

    Args:
        scores: Columns of the key, group (see `bootstrap_interval`) and the value.
        key: Columns that tell the parts apart.
        value: Column that is averaged.

    Returns:
        The key, mean, low, high, n.
    """
    parts = scores.groupby(list(key), sort=False)
    rows = [(*name, *bootstrap_interval(part[value], part["group"])) for name, part in parts]
    return pd.DataFrame(rows, columns=[*key, *Interval._fields])


def resampled_weights(groups: ArrayLike, samples: int, seed: int) -> NDArray[np.float64]:
    """How often each image is drawn in each bootstrap sample of whole groups: (samples, images).

    Args:
        groups: One per image; "" is a group of its own.
        samples: Number of resamples.
        seed: Of the draws.
    """
    names = np.asarray(groups, str)
    codes, unique = pd.factorize(_codes(len(names), names))
    share = np.full(len(unique), 1 / len(unique))
    drawn = np.random.default_rng(seed).multinomial(len(unique), share, size=samples)
    return drawn[:, codes].astype(float)


def _codes(length: int, groups: ArrayLike | None) -> NDArray[np.int64]:
    """A number for the group of each image; "" gets one of its own."""
    alone = np.arange(length)
    if groups is None:
        return alone
    names = np.asarray(groups, str)
    if names.shape != (length,):
        raise ValueError(f"groups must hold one name per value ({length}), got {names.shape}.")
    _, codes = np.unique(names, return_inverse=True)
    return np.where(names == "", length + alone, codes)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    groups: ArrayLike | None = None,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of first - second over the same images, with its paired bootstrap interval.

    Args:
        first: One value per image.
        second: Of the same images in the same order; an image without a finite value in both is
            left out.
        groups: See `bootstrap_interval`, as are the other arguments.
        samples: Number of resamples.
        seed: Of the draws.
        level: Share of the resampled differences inside the interval.

    Raises:
        ValueError: If the lengths differ.
    """
    one, two = np.asarray(first, float), np.asarray(second, float)
    if one.shape != two.shape:
        raise ValueError(f"paired values must be of the same images, got {one.shape}, {two.shape}.")
    both = np.isfinite(one) & np.isfinite(two)
    difference = np.subtract(one, two, out=np.full(one.shape, np.nan), where=both)
    return bootstrap_interval(difference, groups, samples, seed, level)


def mean_over_seeds(scores: pd.DataFrame) -> pd.DataFrame:
    """One value per image and score: the mean over the column seed, where there is one."""
    key = ["id", "group", *ROW, "metric"]
    return checked_scores(scores).groupby(key, sort=False)["value"].mean().reset_index()


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean and bootstrap interval of every score of every row, in order of appearance.

    Args:
        scores: See `checked_scores`. Of several seeds the mean per image is taken first, so that
            n counts images.

    Returns:
        Long form: method, views, smoothing, metric, mean, low, high, n.
    """
    return intervals_by(mean_over_seeds(scores), [*ROW, "metric"])


def compare_to(scores: pd.DataFrame, metric: str, reference: Row) -> pd.DataFrame:
    """Paired difference of every other row minus the reference, over the images they share.

    A row whose ``high`` is below 0 is worse than the reference by the paired interval.

    Args:
        scores: See `checked_scores`; of several seeds the mean per image is taken first.
        metric: Name of the score that is compared.
        reference: The row that the others are held against.

    Returns:
        Long form: method, views, smoothing, metric, mean, low, high, n.

    Raises:
        ValueError: If the reference has no such score.
    """
    chosen = mean_over_seeds(scores[scores["metric"] == metric])
    wide = chosen.set_index(["id", "group", *ROW])["value"].unstack(ROW, sort=False)
    if tuple(reference) not in wide.columns:
        raise ValueError(f"no {metric!r} of {tuple(reference)}; there are {list(wide.columns)}.")
    base, groups = wide[tuple(reference)], wide.index.get_level_values("group")
    rows = [
        (*name, metric, *paired_difference(wide[name], base, groups))
        for name in wide.columns.drop([tuple(reference)]).tolist()
    ]
    return pd.DataFrame(rows, columns=[*ROW, "metric", *Interval._fields])
