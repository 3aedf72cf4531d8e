"""Every metric of one map: where it points, and what the classifier says without that part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from classifiers.network import Network, probabilities
from explainers.evaluation.metrics.boxes import PixelAveragePrecision
from explainers.evaluation.metrics.faithfulness import (
    confidence_drop,
    confidence_increased,
    insertion_deletion,
    masked,
    road,
)
from explainers.evaluation.metrics.localisation import average_precision
from explainers.evaluation.metrics.overlap import (
    area_matched,
    binary_coverage,
    otsu_thresholds,
    overlap,
    pixel_auprc,
    relevance_mass,
    relevance_rank,
    soft_coverage,
)
from explainers.evaluation.metrics.pointing import graded_hit, pointing_game
from explainers.evaluation.metrics.scaling import min_max
from explainers.evaluation.statistics import Interval, intervals_by
from explainers.evaluation.tables import interval_text, markdown

Batch = Mapping[str, Any]
KEY = ["method", "metric"]


def location_scores(saliency: Float[Tensor, "b h w"], batch: Batch) -> dict[str, Tensor]:
    """Agreement of each map with the evidence (b); a thresholded map is cut at Otsu's threshold.

    Args:
        saliency: Maps.
        batch: Of a data module: mask, importance. Without levels of relevance there is no graded
            hit.
    """
    mask, importance = batch["mask"], batch["importance"]
    scaled = min_max(saliency)
    kept = scaled > otsu_thresholds(scaled)[:, None, None]
    matched, cut = area_matched(saliency, mask), overlap(kept, mask)
    scores = {
        "average_precision": average_precision(saliency, mask),
        "pixel_auprc": pixel_auprc(saliency, mask),
        "pointing_game": pointing_game(saliency, mask),
        "relevance_mass": relevance_mass(saliency, mask),
        "relevance_rank": relevance_rank(saliency, mask),
        "area_matched_iou": matched.jaccard,
        "otsu_iou": cut.jaccard,
        "otsu_dice": cut.dice,
        "soft_coverage": soft_coverage(scaled, mask),
        **{f"otsu_{name}": value for name, value in binary_coverage(kept, mask).items()},
    }
    if importance.any():
        graded = graded_hit(saliency, importance)
        scores["graded_hit"] = graded.where(importance.flatten(1).any(1), torch.nan)
    return scores


@torch.no_grad()
def faithfulness_scores(
    saliency: Float[Tensor, "b h w"], batch: Batch, network: Network
) -> dict[str, Tensor]:
    """What becomes of the probability of the decided class (b) as parts of the image go.

    drop and increase end in what is removed, "relevant" or "rest", and how: "soft" by the scaled
    map, "hard" by the map cut at Otsu's threshold.

    Args:
        saliency: Maps.
        batch: Of a data module: image.
        network: The classifier.
    """

    def probability(images: Tensor, target: Tensor) -> Tensor:
        return probabilities(network(images)).gather(1, target[:, None])[:, 0]

    image, scaled = batch["image"], min_max(saliency)
    target = network.decide(image)
    before = probability(image, target)
    weights = {"soft": scaled, "hard": scaled > otsu_thresholds(scaled)[:, None, None]}
    scores = {}
    for how, weight in weights.items():
        for part in ("relevant", "rest"):
            after = probability(masked(image, weight, part), target)
            scores[f"drop_{part}_{how}"] = confidence_drop(before, after)
            scores[f"increase_{part}_{how}"] = confidence_increased(before, after)
    scores |= insertion_deletion(probability, image, target, saliency)
    return scores | road(probability, image, target, saliency)


def pixels_of_all(name: str, maps: Sequence[Tensor], batches: Sequence[Batch]) -> pd.DataFrame:
    """PxAP of a method's maps, a line without an interval: its curve is of all images together."""
    metric = PixelAveragePrecision().to(maps[0].device)
    for saliency, batch in zip(maps, batches, strict=True):
        metric.update(saliency, batch["mask"])
    count = sum(int(batch["mask"].flatten(1).any(1).sum()) for batch in batches)
    line = Interval(float(metric.compute()), float("nan"), float("nan"), count)
    return pd.DataFrame([(name, "pixel_average_precision", *line)], columns=[*KEY, *line._fields])


def write(scores: pd.DataFrame, pixels: pd.DataFrame, out: Path) -> None:
    """Write quality_scores.csv (per image), quality.csv and quality.md.

    Args:
        scores: Columns id, group, method, metric, value.
        pixels: Of `pixels_of_all`, a line per method.
        out: Folder, made if it is not there.
    """
    out.mkdir(parents=True, exist_ok=True)
    scores.to_csv(out / "quality_scores.csv", index=False)
    table = pd.concat([intervals_by(scores, KEY), pixels], ignore_index=True)
    table.to_csv(out / "quality.csv", index=False)
    cells = pd.Series([interval_text(line) for line in table.itertuples()])
    text = table.assign(value=cells.str.removesuffix(" [nan, nan]"))
    wide = text.set_index(KEY)["value"].unstack("method", sort=False)
    (out / "quality.md").write_text(markdown(wide.reset_index().rename_axis(columns=None)))
