"""Weak localisation: how well the order of a map's pixels finds the evidence mask."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor
from torch.nn.functional import pad

from explainers.evaluation.metrics.mean import ImageMean

PERCENTILES = (80.0, 85.0, 90.0, 95.0, 98.0)  # of the IoUs in the paper's tables
CACHED_PIXELS = 2**20  # ranked at a time: a batch that leaves the cache takes longer
CURVE = tuple(float(percentile) for percentile in range(100))


class Ranked(NamedTuple):
    """The pixels of each map from the least to the most relevant.

    Attributes:
        values: Ascending.
        hits: Number of mask pixels among those from index i on; 0 at the last index, n.
    """

    values: Float32[Tensor, "b n"]
    hits: Int64[Tensor, "b n1"]


class PercentileCurve(NamedTuple):
    """Scores of each map thresholded at its own percentiles; NaN where the mask is empty."""

    precision: Float64[Tensor, "b p"]
    recall: Float64[Tensor, "b p"]
    iou: Float64[Tensor, "b p"]


def rank(saliency: Tensor, mask: Tensor) -> Ranked:
    """Sort the pixels of each map once, on its device, carrying the mask along.

    Maps are read as float32; NaN pixels rank below all others, infinities at the ends of
    float32's range. The mask travels in the last bit of the value as float64, which float32
    leaves free: no index is sorted along.

    Args:
        saliency: Float (b, h, w).
        mask: Bool (b, h, w), True inside the evidence.

    Raises:
        ValueError: If the shapes differ or the mask is not boolean.
    """
    if saliency.shape != mask.shape or saliency.ndim != 3 or mask.dtype != torch.bool:
        raise ValueError(
            "saliency and mask must both be (b, h, w) and the mask boolean, but got "
            f"{tuple(saliency.shape)} and {tuple(mask.shape)} {mask.dtype}."
        )
    lowest = torch.finfo(torch.float32).min
    keys = saliency.detach().float().nan_to_num(nan=lowest).flatten(1).double()
    keys.view(torch.int64).bitwise_or_(mask.flatten(1).long())
    keys = _sorted(keys)
    hit = keys.view(torch.int64) & 1
    hits = mask.sum((1, 2))[:, None] - pad(hit.cumsum(1), (1, 0))
    return Ranked(keys.float(), hits)


def _sorted(keys: Float64[Tensor, "b n"]) -> Float64[Tensor, "b n"]:
    if keys.device.type == "cpu":  # torch's own CPU sort carries indices: ten times slower
        return torch.from_numpy(np.sort(keys.numpy(), axis=1))
    return keys.sort(dim=1).values


def curve_at(ranked: Ranked, percentiles: Sequence[float]) -> PercentileCurve:
    """Precision, recall and IoU of the pixels at or above each percentile of their own map.

    Thresholds are those of ``np.percentile(map, [...])``: positions and linear interpolation in
    float64, so that the counts agree pixel by pixel.

    Raises:
        ValueError: If a percentile is outside [0, 100).
    """
    if not all(0 <= percentile < 100 for percentile in percentiles):
        raise ValueError(f"percentiles must be in [0, 100), but got {list(percentiles)}.")
    values, hits = ranked
    n = values.shape[1]
    position = (n - 1) * (np.asarray(percentiles, float) / 100)
    index = torch.from_numpy(position.astype(np.int64)).to(values.device)
    weight = torch.from_numpy(position % 1).to(values.device)
    low, high = values[:, index], values[:, (index + 1).clamp(max=n - 1)]
    threshold = low + (high.double() - low) * weight
    kept = torch.where(threshold > low, high, low)  # no value lies between the two
    start = torch.searchsorted(values, kept.contiguous())
    hit, positives = hits.gather(1, start).double(), hits[:, :1].double()
    recall = hit / positives  # NaN for an empty mask
    iou = hit / (n - start + positives - hit)
    unknown = recall.isnan()
    precision = (hit / (n - start)).masked_fill(unknown, torch.nan)
    return PercentileCurve(precision, recall, iou.masked_fill(unknown, torch.nan))


def percentile_curve(
    saliency: Float[Tensor, "b h w"], mask: Bool[Tensor, "b h w"]
) -> PercentileCurve:
    """Precision, recall and IoU of each map at its percentiles 0 .. 99, each (b, 100).

    Source: arXiv:2012.07332, Sec. IV-E. Ties at the threshold stay in.
    """
    return curve_at(rank(saliency, mask), CURVE)


def percentile_iou(
    saliency: Float[Tensor, "b h w"], mask: Bool[Tensor, "b h w"], percentile: float
) -> Float64[Tensor, " b"]:
    """IoU between a mask and the pixels of each map at or above its own percentile (Eqs. 12, 13).

    Args:
        saliency: Only the order of its values counts; NaN ranks lowest.
        mask: True inside the evidence.
        percentile: Percent of pixels left out: 95 keeps the top 5 %.

    Returns:
        IoU in [0, 1] of each image; NaN where the mask is empty.

    Raises:
        ValueError: If ``percentile`` is outside [0, 100).

    Source: arXiv:2012.07332, Sec. IV-E. Ties at the threshold stay in.
    """
    return curve_at(rank(saliency, mask), [percentile]).iou[:, 0]


def average_precision(
    saliency: Float[Tensor, "b h w"], mask: Bool[Tensor, "b h w"]
) -> Float64[Tensor, " b"]:
    """Average precision of the pixels of each image, every distinct value a threshold.

    Returns:
        In [0, 1]; the mask's share for a constant map; NaN where the mask is empty.

    Source: scikit-learn's ``average_precision_score``: tied pixels enter together.
    """
    return ranked_average_precision(rank(saliency, mask))


def ranked_average_precision(ranked: Ranked) -> Float64[Tensor, " b"]:
    """Average precision from sorted pixels."""
    values, hits = ranked
    start, count = tie_starts(values), values.shape[1]
    precision = hits[:, :-1].gather(1, start).double() / (count - start)
    return -(precision * hits.diff(dim=1)).sum(1) / hits[:, 0]


def tie_starts(values: Float32[Tensor, "b n"]) -> Int64[Tensor, "b n"]:
    """Index of the first of the equal values that each of the ascending values belongs to."""
    index = torch.arange(values.shape[1], device=values.device)
    first = pad(values[:, 1:] != values[:, :-1], (1, 0), value=True)
    return torch.where(first, index, 0).cummax(1).values


def total_auc(curve: PercentileCurve) -> Float64[Tensor, " b"]:
    """Area under precision over recall at percentiles 0 .. 99, the paper's form.

    No point is added at recall 0: a perfect two-valued map scores 0. Only for comparison with the
    paper's tables; judge by `average_precision`.
    """
    return -torch.trapezoid(curve.precision, curve.recall, dim=1)


def partial_auc(curve: PercentileCurve) -> Float64[Tensor, " b"]:
    """Area under precision over recall at percentiles 80 .. 99; see `total_auc`.

    The range is a reading that reproduces the size of the paper's numbers.
    """
    return -torch.trapezoid(curve.precision[:, 80:], curve.recall[:, 80:], dim=1)


def localisation_scores(
    saliency: Float[Tensor, "b h w"],
    mask: Bool[Tensor, "b h w"],
    percentiles: Sequence[float] = PERCENTILES,
) -> dict[str, Float64[Tensor, " b"]]:
    """All localisation scores of each image, each map sorted once.

    Returns:
        "average_precision", "iou_80" .. (one per percentile), "total_auc" and "partial_auc";
        NaN where the mask is empty. A map that is constant or holds NaN is scored, with a warning.
    """
    _warn_of_degenerate(saliency)
    maps = max(1, CACHED_PIXELS // max(1, saliency.shape[1:].numel()))
    starts = range(0, max(1, len(saliency)), maps)
    parts = (slice(start, start + maps) for start in starts)
    scores = [_scores(rank(saliency[part], mask[part]), percentiles) for part in parts]
    return dict(zip(score_names(percentiles), torch.cat(scores, 1), strict=True))


def operating_points(
    saliency: Float[Tensor, "b h w"],
    mask: Bool[Tensor, "b h w"],
    percentiles: Sequence[float] = PERCENTILES,
) -> dict[str, Float64[Tensor, " b"]]:
    """Precision and recall of each map at its own percentiles: "precision_80", "recall_80", ...

    NaN where the mask is empty.
    """
    curve = curve_at(rank(saliency, mask), percentiles)
    points: dict[str, Tensor] = {}
    for name, values in (("precision", curve.precision), ("recall", curve.recall)):
        points |= {f"{name}_{p:g}": v for p, v in zip(percentiles, values.unbind(1), strict=True)}
    return points


def _scores(ranked: Ranked, percentiles: Sequence[float]) -> Float64[Tensor, "s b"]:
    curve, ious = curve_at(ranked, CURVE), curve_at(ranked, percentiles).iou
    areas = [total_auc(curve), partial_auc(curve)]
    return torch.stack([ranked_average_precision(ranked), *ious.unbind(1), *areas])


def score_names(percentiles: Sequence[float]) -> list[str]:
    """Names of `localisation_scores` in their order; an IoU is "iou_80" or "iou_97.5"."""
    ious = [f"iou_{percentile:g}" for percentile in percentiles]
    return ["average_precision", *ious, "total_auc", "partial_auc"]


def _warn_of_degenerate(saliency: Float[Tensor, "b h w"]) -> None:
    low, high = saliency.flatten(1).aminmax(dim=1)
    constant, unknown = int((low == high).sum()), int(low.isnan().sum())
    if constant or unknown:
        warnings.warn(
            f"Of {len(saliency)} maps {constant} are constant and {unknown} hold NaN: a constant "
            "map scores the mask's share as average precision, NaN pixels rank lowest.",
            stacklevel=3,
        )


class Localisation(ImageMean):
    """Mean of every score of `localisation_scores` over the images with a mask.

    Args:
        percentiles: Of the IoUs.
    """

    def __init__(self, percentiles: Sequence[float] = PERCENTILES) -> None:
        score = partial(localisation_scores, percentiles=tuple(percentiles))
        super().__init__(score, score_names(percentiles))
