"""How well the explained classifier decides, from its decisions and probabilities per image."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from explainers.evaluation.statistics import ROW, Interval, resampled_weights

Array = NDArray[np.float64]


def scored_classes(images: pd.DataFrame) -> list[str]:
    """Classes whose ROC AUC is told: each against the rest, the last one alone of two."""
    names = class_names(images)
    return names[1:] if len(names) == 2 else names


def class_names(images: pd.DataFrame) -> list[str]:
    """All classes, in the order of their columns."""
    return [str(c)[2:-1] for c in images.columns if re.fullmatch(r"p\(.*\)", str(c))]


def classifier_rows(images: pd.DataFrame) -> pd.DataFrame:
    """AUC of each class (the last one alone of two) and `decision_scores`, with intervals.

    Args:
        images: Per image: id, group, label, decision, p(class) of each; column seed where several
            classifiers decided.
    """
    names = scored_classes(images)
    rows = {
        "auc" if len(names) == 1 else f"auc_{name}": auc_interval(images, name) for name in names
    }
    rows = decision_intervals(images) | rows
    lines = [("Classifier", "plain", "raw", metric, *value) for metric, value in rows.items()]
    return pd.DataFrame(lines, columns=[*ROW, "metric", *Interval._fields])


def decision_scores(confusion: Array, names: list[str]) -> dict[str, Array]:
    """Accuracy, and precision, recall and F1 of each class and weighted by the classes' shares.

    Args:
        confusion: Weights (s, true class, decided class).
        names: Of the classes.

    Returns:
        By name, s values each: "accuracy", "precision", "precision_<class>", ...; precision is 0
        where nothing was decided so, and a class without images has NaN.

    Source: scikit-learn's ``precision_recall_fscore_support``, average "weighted".
    """
    hit = np.diagonal(confusion, axis1=-2, axis2=-1)
    true, decided = confusion.sum(-1), confusion.sum(-2)
    share = true / true.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = hit / true
        precision = np.where(true > 0, np.where(decided > 0, hit / decided, 0.0), np.nan)
        f1 = np.where(true > 0, 2 * hit / (true + decided), np.nan)
    scores = {"accuracy": hit.sum(-1) / true.sum(-1)}
    for name, each in (("precision", precision), ("recall", recall), ("f1", f1)):
        scores[name] = np.nansum(share * each, -1)
        scores |= {f"{name}_{label}": each[..., k] for k, label in enumerate(names)}
    return scores


def decision_intervals(images: pd.DataFrame) -> dict[str, Interval]:
    """`decision_scores` of the images with bootstrap intervals; of several seeds the mean."""
    names = class_names(images)

    def scores(part: pd.DataFrame, weights: Array) -> dict[str, Array]:
        pairs = pd.get_dummies(part[["label", "decision"]].astype(str), dtype=float)
        one, two = (
            np.stack([pairs.get(f"{kind}_{k}", pd.Series(0.0, part.index)) for k in names], 1)
            for kind in ("label", "decision")
        )
        return decision_scores(np.einsum("si,ij,ik->sjk", weights, one, two), names)

    return intervals(images, scores)


def intervals(
    images: pd.DataFrame,
    scores: Callable[[pd.DataFrame, Array], dict[str, Array]],
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Scores of a whole set of images with intervals, bootstrapped over groups of images.

    Args:
        images: Columns id, group and, of several classifiers, seed: then the mean over them.
        scores: From the images of a seed and weights (s, images), s values of each score.
        samples: Number of resamples; those in which a score is NaN are left out of its interval.
        seed: Of the draws, which all seeds share.
    """
    first = images.drop_duplicates("id").set_index("id")
    drawn = resampled_weights(first["group"], samples, seed)
    weights = np.concatenate([np.ones((1, len(first))), drawn])  # first the images themselves
    values: dict[str, list[Array]] = {}
    for _, part in images.groupby("seed") if "seed" in images else [(0, images)]:
        for name, value in scores(part.set_index("id").loc[first.index], weights).items():
            values.setdefault(name, []).append(value)
    found = {}
    for name, each in values.items():
        every = np.mean(each, 0)
        mean, resampled = every[0], every[1:]
        known = np.isfinite(resampled).any() and np.isfinite(mean)
        low, high = np.nanquantile(resampled, [0.025, 0.975]) if known else (np.nan, np.nan)
        found[name] = Interval(float(mean), float(low), float(high), len(first))
    return found


def auc_interval(images: pd.DataFrame, name: str, samples: int = 2000, seed: int = 0) -> Interval:
    """ROC AUC of one class against the rest, bootstrapped over groups of images.

    The Mann-Whitney form: share of (positive, negative) pairs in the right order, ties half; of
    several seeds, each with its own labels, the mean of their AUCs. NaN without one of the two.
    """

    def auc(part: pd.DataFrame, weights: Array) -> dict[str, Array]:
        positive = (part["label"] == name).to_numpy()
        score = part[f"p({name})"].to_numpy()
        pairs = (np.sign(score[positive, None] - score[~positive]) + 1) / 2
        one, two = weights[:, positive], weights[:, ~positive]
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"auc": ((one @ pairs) * two).sum(1) / (one.sum(1) * two.sum(1))}

    return intervals(images, auc, samples, seed)["auc"]
