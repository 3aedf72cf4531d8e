"""At which threshold does a map overlap best with each kind of evidence?

Source: "On the overlap between Grad-CAM saliency maps and explainable visual features in skin
cancer images".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from explainers.evaluation.figures import curves
from explainers.evaluation.metrics.overlap import TENTHS, threshold_sweep
from explainers.evaluation.metrics.scaling import (
    min_max,
    region_min_max,
    set_range,
    set_wide,
    superpixels,
    tiles,
)
from explainers.evaluation.statistics import intervals_by
from explainers.evaluation.tables import markdown

Rows = list[dict[str, object]]
Scaling = Literal["map", "set", "tiles", "superpixels"]
UNION = "union"
CURVE = ["method", "scaling", "feature", "threshold"]


@dataclass(frozen=True)
class Sweep:
    """How maps are scaled to [0, 1] and where they are cut.

    Attributes:
        scalings: "map" by each map's own range, "set" by the 1st and 99th percentile of all maps of
            the split, "tiles" and "superpixels" by the range of each region of each map.
        thresholds: In [0, 1]; the pixels at or above are kept.
        tile: Side of a tile, share of the image's width.
        superpixels: Superpixels per image (SLIC).

    Raises:
        ValueError: If there is no threshold, or one outside [0, 1].
    """

    scalings: tuple[Scaling, ...] = ("map", "set", "tiles", "superpixels")
    thresholds: tuple[float, ...] = TENTHS
    tile: float = 0.25
    superpixels: int = 100

    def __post_init__(self) -> None:
        """Check the user's values."""
        if not self.thresholds or not all(0 <= t <= 1 for t in self.thresholds):
            raise ValueError(f"thresholds must be in [0, 1], but got {list(self.thresholds)}.")

    def scaled(
        self, maps: Float[Tensor, "b h w"], image: Float[Tensor, "b c h w"], scaling: Scaling
    ) -> Float[Tensor, "b h w"]:
        """All maps of a split, scaled to [0, 1]."""
        if scaling == "map":
            return min_max(maps)
        if scaling == "set":
            return set_wide(maps, set_range([maps]))
        if scaling == "superpixels":
            return region_min_max(maps, superpixels(image, self.superpixels))
        height, width = maps.shape[1:]
        return region_min_max(maps, tiles(height, width, max(1, round(self.tile * width))))

    def scores(
        self,
        facts: dict[str, object],
        ids: Sequence[str],
        maps: Float[Tensor, "b h w"],
        image: Float[Tensor, "b c h w"],
        masks: dict[str, Bool[Tensor, "b h w"]],
    ) -> Rows:
        """Jaccard and Dice of every image, scaling, kind of evidence and threshold.

        Args:
            facts: Written into every line: method, split.
            ids: Of the images.
            maps: Of all images of a split.
            image: The images.
            masks: By the name of the evidence; an image that lacks it is left out there.
        """
        rows: Rows = []
        for scaling in self.scalings:
            scaled = self.scaled(maps, image, scaling)
            for feature, mask in masks.items():
                found = threshold_sweep(scaled, mask, self.thresholds)
                there = mask.flatten(1).any(1).nonzero().flatten().tolist()
                for t, threshold in enumerate(self.thresholds):
                    line = {**facts, "scaling": scaling, "feature": feature, "threshold": threshold}
                    jaccard, dice = found.jaccard[:, t].tolist(), found.dice[:, t].tolist()
                    rows += [
                        {"id": ids[k], **line, "jaccard": jaccard[k], "dice": dice[k]}
                        for k in there
                    ]
        return rows


def summary(scores: pd.DataFrame, metric: str, key: Sequence[str]) -> pd.DataFrame:
    """Mean with its interval, smallest and largest value of every group of lines.

    Args:
        scores: Columns id, group, those of the key, and the metric.
        metric: "jaccard" or "dice".
        key: Columns that are told apart.
    """
    ends = scores.groupby(list(key), sort=False)[metric].agg(["min", "max"]).reset_index()
    return intervals_by(scores, key, metric).merge(ends, on=list(key))


def best_thresholds(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The threshold of the highest validation mean, and what it gives on the other split.

    Args:
        scores: Columns id, group, method, split, scaling, feature, threshold, jaccard, dice.
        metric: "jaccard" or "dice".

    Returns:
        One line per method, scaling and feature: threshold, validation (mean there), and mean,
        low, high, n, min, max on the other split. Of equal thresholds the lowest.

    Raises:
        ValueError: If a kind of evidence is in no validation image.
    """
    validation = scores[scores["split"] == "val"]
    others = scores[scores["split"] != "val"]
    missing = set(others["feature"]) - set(validation["feature"])
    if missing:
        raise ValueError(
            f"thresholds are chosen on validation images, but none of them has {sorted(missing)}; "
            "leave these features out or take other splits."
        )
    means = validation.groupby(CURVE, sort=False)[metric].mean().rename("validation").reset_index()
    chosen = means.loc[means.groupby(CURVE[:-1], sort=False)["validation"].idxmax().tolist()]
    return chosen.merge(summary(others, metric, CURVE), on=CURVE)


def breakdown(scores: pd.DataFrame, best: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Scores at the union's best threshold by class and by right and wrong classification.

    Args:
        scores: As in `best_thresholds`, with the columns label and correct.
        best: Of `best_thresholds`.
        metric: "jaccard" or "dice".
    """
    chosen = best.loc[best["feature"] == UNION, CURVE]
    at_best = scores[scores["split"] != "val"].merge(chosen, on=CURVE)
    return summary(at_best, metric, [*CURVE, "label", "correct"])


def write(scores: pd.DataFrame, metric: str, out: Path) -> None:
    """Write all tables as CSV, thresholds.md, and a plot of every scaling of the union.

    Args:
        scores: As in `breakdown`.
        metric: "jaccard" or "dice", by which thresholds are chosen.
        out: Folder, made if it is not there.
    """
    out.mkdir(parents=True, exist_ok=True)
    scores.to_csv(out / "thresholds_scores.csv", index=False)
    tested = scores[scores["split"] != "val"]
    table = pd.concat([summary(tested, m, CURVE).assign(metric=m) for m in ("jaccard", "dice")])
    table.to_csv(out / "thresholds.csv", index=False)
    best = best_thresholds(scores, metric)
    best.to_csv(out / "best_thresholds.csv", index=False)
    split = breakdown(scores, best, metric)
    split.to_csv(out / "thresholds_by_class.csv", index=False)
    parts: list[Any] = [f"## Best thresholds ({metric}), chosen on validation", best]
    parts += [f"## {metric} at the union's best threshold", split]
    text = [part if isinstance(part, str) else markdown(part.round(3)) for part in parts]
    (out / "thresholds.md").write_text("\n\n".join(text))
    for scaling, part in table[table["feature"] == UNION].groupby("scaling"):
        steps = part.rename(columns={"threshold": "step"})
        plot = curves(steps, metric, f"threshold of maps scaled by {scaling}")
        (out / f"thresholds_{scaling}.png").write_bytes(plot)
